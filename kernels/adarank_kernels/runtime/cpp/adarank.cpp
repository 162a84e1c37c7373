// The LoRA linears' products with few ranks on the CPU, whole passes of a group for any device, and
// Philox words.
//
// Every function that PyTorch calls is an operator of the library `adarank`, with a schema that says what
// it mutates; in-place operators bump the version of what they write. The passes (`group_forward`,
// `group_backward`) call aten for the base products and must therefore not run where somebody watches
// operators (a dispatch mode): Python sees to that and does the same step by step.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#define INLINE static inline __attribute__((always_inline))

namespace {

using at::Tensor;
using OptionalTensors = c10::List<std::optional<Tensor>>;

// A low-rank matrix [rank, features]: strides in elements of its own type, `first` its first column of S.
struct Factor {
    void *data;
    int64_t of_rank, of_feature, rank, first;
    bool is_float;
};

struct Matrix { // rows in order, `ld` elements from one to the next
    void *data;
    int64_t ld, rows, columns;
};

struct Products { // of one element type, for one instruction set
    void (*shrink)(const Matrix &x, const Matrix &s, const std::vector<Factor> &, float scaling, int threads);
    void (*expand)(const Matrix &x, const Matrix &s, const std::vector<Factor> &, float scaling,
                   const void *bias, int threads);
    void (*outer)(const Matrix &x, const Matrix &s, const std::vector<Factor> &, float scaling, int threads);
    void (*drop)(const Matrix &x, const Matrix &y, uint64_t key, int dropped, bool add, int threads);
};

template <typename T>
struct Buffer { // aligned, and freed whatever happens
    T *data;
    explicit Buffer(int64_t count)
    {
        TORCH_CHECK(count < std::numeric_limits<int64_t>::max() / 64, "adarank: a product is too large");
        data = (T *)std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64);
        TORCH_CHECK(data, "adarank: no memory for a product");
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer &) = delete;
};

constexpr int64_t SMALL = 1 << 16; // multiplications that are not worth a second thread
constexpr int64_t FEW = 8;         // fewer rows are multiplied without packing the factors

INLINE bool alone(int64_t multiplications) { return multiplications < SMALL; }

// Philox4x32-10 with counters (first + i, row, 0, 0), i < COUNTERS: words in the order of i.
constexpr int COUNTERS = 16;
INLINE void philox_words(uint64_t key, uint32_t row, uint32_t first, uint32_t *out)
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    uint32_t c0[COUNTERS], c1[COUNTERS], c2[COUNTERS], c3[COUNTERS];
    for (int i = 0; i < COUNTERS; i++)
        c0[i] = first + i, c1[i] = row, c2[i] = 0, c3[i] = 0;
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < COUNTERS; i++) {
            uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0, c1[i] = (uint32_t)p1;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1, c3[i] = (uint32_t)p0;
        }
    for (int i = 0; i < COUNTERS; i++)
        out[4 * i] = c0[i], out[4 * i + 1] = c1[i], out[4 * i + 2] = c2[i], out[4 * i + 3] = c3[i];
}

#define ELEMENT_BF16 0
#define LANES 8
namespace float_any {
#include "products.h"
}
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace float_avx2 {
#include "products.h"
}
#pragma GCC pop_options
#undef LANES
#define LANES 16
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace float_avx512 {
#include "products.h"
}
#pragma GCC pop_options
#undef ELEMENT_BF16
#define ELEMENT_BF16 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace bfloat16_avx512 {
#include "products.h"
}
#pragma GCC pop_options

// The products in a type on this CPU; null where aten does them.
const Products *products(at::ScalarType dtype)
{
    static const bool avx512 = [] {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }();
    static const bool bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16");
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (dtype == at::kFloat)
        return avx512 ? &float_avx512::table : avx2 ? &float_avx2::table : &float_any::table;
    return dtype == at::kBFloat16 && bfloat16 ? &bfloat16_avx512::table : nullptr;
}

const Products &products_of(const Tensor &x)
{
    auto found = products(x.scalar_type());
    TORCH_CHECK(x.device().is_cpu() && found, "adarank: no products for ", x.scalar_type(), " on ", x.device());
    return *found;
}

int64_t padded(int64_t rank, at::ScalarType dtype) { return dtype == at::kBFloat16 ? rank + rank % 2 : rank; }

Tensor rows_of(const Tensor &x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

bool in_order(const Tensor &x)
{
    return (x.size(1) <= 1 || x.stride(1) == 1) && (x.size(0) <= 1 || x.stride(0) >= x.size(1));
}

Tensor ordered(const Tensor &x)
{
    TORCH_CHECK(x.dim() == 2, "adarank: rows must be a matrix, got ", x.sizes());
    return in_order(x) ? x : x.contiguous();
}

// Never null: memset and pointer arithmetic must not see a null pointer, not even for no elements. The storage
// may be smaller than the shape says: FSDP frees what it has sharded.
void *data_of(const Tensor &x)
{
    static char nothing[64];
    if (!x.numel())
        return nothing;
    int64_t last = x.storage_offset();
    for (int64_t d = 0; d < x.dim(); d++)
        last += (x.size(d) - 1) * x.stride(d);
    TORCH_CHECK((uint64_t)(last + 1) * x.element_size() <= x.storage().nbytes(), "adarank: ", x.sizes(), " of ",
                x.scalar_type(), " needs more than its storage of ", x.storage().nbytes(), " bytes");
    return x.data_ptr();
}

// The products trust what they are told; the checks are here.
Matrix matrix(const char *name, const Tensor &x, at::ScalarType dtype, int64_t rows, int64_t columns)
{
    TORCH_CHECK(x.device().is_cpu() && x.dim() == 2 && x.scalar_type() == dtype && in_order(x) &&
                    x.size(0) == rows && x.size(1) == columns,
                "adarank: ", name, " must be ", dtype, " [", rows, ", ", columns,
                "] on the CPU with its rows in order, got ", x.scalar_type(), " ", x.sizes(), " with strides ",
                x.strides(), " on ", x.device());
    TORCH_CHECK(columns <= std::numeric_limits<int32_t>::max(), "adarank: ", name, " has too many columns");
    return {data_of(x), x.size(0) > 1 ? x.stride(0) : std::max<int64_t>(columns, 1), rows, columns};
}

// Whether a rank's columns of S, from `first` on, are among `width`.
bool fits(int64_t rank, int64_t first, int64_t width, at::ScalarType dtype)
{
    if (rank < 0 || rank > width || first < 0) // no sum of what follows overflows
        return false;
    return first <= width - padded(rank, dtype) && padded(first, dtype) == first;
}

// The columns of S that meet lora_B's ranks, or `rank` ones.
Tensor columns_of(const Tensor &s, int64_t rank, int64_t first, at::ScalarType dtype)
{
    TORCH_CHECK(s.dim() == 2 && fits(rank, first, s.size(1), dtype), "adarank: rank ", rank, " from column ",
                first, " does not fit S ", s.sizes());
    return s.narrow(1, first, padded(rank, dtype));
}

int64_t rank_of(const Tensor &lora_B)
{
    TORCH_CHECK(lora_B.dim() == 2, "adarank: lora_B must be a matrix, got ", lora_B.sizes());
    return lora_B.size(1);
}

// `rank_dim` is the dimension of `tensor` that counts the ranks.
Factor factor(const Tensor &tensor, int64_t rank_dim, int64_t first, int64_t features, int64_t width,
              at::ScalarType dtype)
{
    TORCH_CHECK(tensor.device().is_cpu() && tensor.dim() == 2 && tensor.size(1 - rank_dim) == features &&
                    (tensor.scalar_type() == dtype || tensor.scalar_type() == at::kFloat),
                "adarank: a low-rank matrix must have ", features, " features of ", dtype,
                " or float32, got ", tensor.scalar_type(), " ", tensor.sizes());
    int64_t rank = tensor.size(rank_dim);
    TORCH_CHECK(fits(rank, first, width, dtype), "adarank: rank ", rank, " from column ", first,
                " does not fit ", width, " columns");
    return {data_of(tensor), tensor.stride(rank_dim), tensor.stride(1 - rank_dim), rank, first,
            tensor.scalar_type() == at::kFloat};
}

const void *bias_of(const std::optional<Tensor> &bias, at::ScalarType dtype, int64_t features)
{
    if (!bias)
        return nullptr;
    TORCH_CHECK(bias->device().is_cpu() && bias->scalar_type() == dtype && bias->dim() == 1 &&
                    bias->size(0) == features && bias->is_contiguous(),
                "adarank: bias must be contiguous ", dtype, " [", features, "], got ", bias->scalar_type(), " ",
                bias->sizes());
    return bias->data_ptr();
}

std::vector<Factor> side_by_side(at::TensorList lora_A, at::IntArrayRef first, int64_t features, int64_t width,
                                 at::ScalarType dtype)
{
    TORCH_CHECK(lora_A.size() == first.size(), "adarank: ", lora_A.size(), " matrices for ", first.size(),
                " columns");
    std::vector<Factor> factors;
    factors.reserve(first.size());
    for (size_t m = 0; m < first.size(); m++)
        factors.push_back(factor(lora_A[m], 0, first[m], features, width, dtype));
    return factors;
}

int dropped_below(double dropout)
{
    TORCH_CHECK(dropout >= 0 && dropout <= 1, "adarank: dropout must be in [0, 1], got ", dropout);
    return (int)std::nearbyint(dropout * 65536);
}

uint64_t key_of(const Tensor &seed)
{
    TORCH_CHECK(seed.device().is_cpu() && seed.scalar_type() == at::kLong && seed.numel() == 1,
                "adarank: seed must be one int64 on the CPU, got ", seed.scalar_type(), " ", seed.sizes());
    return (uint64_t)*seed.data_ptr<int64_t>();
}

// The operators' bodies.

Tensor drop(const Tensor &x, const Tensor &seed, double dropout)
{
    auto X = ordered(x);
    auto Y = at::empty({X.size(0), X.size(1)}, X.options());
    int64_t N = X.size(0), features = X.size(1);
    products_of(X).drop(matrix("x", X, X.scalar_type(), N, features), matrix("out", Y, X.scalar_type(), N, features),
                        key_of(seed), dropped_below(dropout), false, at::get_num_threads());
    return Y;
}

Tensor shrink(const Tensor &x, at::TensorList lora_A, at::IntArrayRef first, int64_t width,
              const std::optional<Tensor> &seed, double dropout)
{
    auto X = seed ? drop(x, *seed, dropout) : ordered(x);
    auto S = at::empty({X.size(0), width}, X.options());
    auto dtype = X.scalar_type();
    auto factors = side_by_side(lora_A, first, X.size(1), width, dtype);
    products_of(X).shrink(matrix("x", X, dtype, X.size(0), X.size(1)), matrix("S", S, dtype, X.size(0), width),
                          factors, 1.0, at::get_num_threads());
    return S;
}

void expand_(Tensor &y, const Tensor &s, const Tensor &lora_B, int64_t first, double scaling,
             const std::optional<Tensor> &bias)
{
    auto dtype = y.scalar_type();
    TORCH_CHECK(y.dim() == 2, "adarank: y must be a matrix, got ", y.sizes());
    auto S = columns_of(s, rank_of(lora_B), first, dtype);
    auto B = factor(lora_B, 1, 0, y.size(1), S.size(1), dtype);
    products_of(y).expand(matrix("y", y, dtype, y.size(0), y.size(1)), matrix("S", S, dtype, y.size(0), S.size(1)), {B},
                          scaling, bias_of(bias, dtype, y.size(1)), at::get_num_threads());
}

void grad_s_(Tensor &ds, const Tensor &dy, const Tensor &lora_B, int64_t first, double scaling)
{
    auto dtype = dy.scalar_type();
    auto dY = ordered(dy);
    auto part = columns_of(ds, rank_of(lora_B), first, dtype);
    auto B = factor(lora_B, 1, 0, dY.size(1), part.size(1), dtype);
    products_of(dY).shrink(matrix("dY", dY, dtype, dY.size(0), dY.size(1)),
                           matrix("dS", part, dtype, dY.size(0), part.size(1)), {B}, scaling, at::get_num_threads());
}

Tensor grad_b(const Tensor &dy, const Tensor &s, int64_t first, int64_t rank, double scaling,
              at::ScalarType dtype_of_B)
{
    auto dtype = dy.scalar_type();
    auto dY = ordered(dy);
    auto S = columns_of(s, rank, first, dtype);
    auto dB = at::empty({dY.size(1), rank}, dY.options().dtype(dtype_of_B));
    auto B = factor(dB, 1, 0, dY.size(1), S.size(1), dtype);
    products_of(dY).outer(matrix("dY", dY, dtype, dY.size(0), dY.size(1)),
                          matrix("S", S, dtype, dY.size(0), S.size(1)), {B}, scaling, at::get_num_threads());
    return dB;
}

std::vector<Tensor> grad_a(const Tensor &ds, const Tensor &x, at::IntArrayRef first, at::IntArrayRef ranks,
                           at::ScalarType dtype_of_A, const std::optional<Tensor> &seed, double dropout)
{
    TORCH_CHECK(first.size() == ranks.size() && ds.dim() == 2, "adarank: one rank for each column");
    auto X = seed ? drop(x, *seed, dropout) : ordered(x);
    auto dtype = X.scalar_type();
    std::vector<Tensor> dA;
    for (auto rank : ranks)
        dA.push_back(at::empty({rank, X.size(1)}, X.options().dtype(dtype_of_A)));
    auto factors = side_by_side(dA, first, X.size(1), ds.size(1), dtype);
    products_of(X).outer(matrix("x", X, dtype, X.size(0), X.size(1)),
                         matrix("dS", ds, dtype, X.size(0), ds.size(1)), factors, 1.0, at::get_num_threads());
    return dA;
}

// dX += drop(dS A).
void grad_x_(Tensor &dx, const Tensor &ds, at::TensorList lora_A, at::IntArrayRef first,
             const std::optional<Tensor> &seed, double dropout)
{
    auto dtype = dx.scalar_type();
    TORCH_CHECK(dx.dim() == 2 && ds.dim() == 2, "adarank: dX and dS must be matrices");
    int64_t N = dx.size(0), features = dx.size(1), width = ds.size(1);
    TORCH_CHECK(padded(width, dtype) == width, "adarank: dS must have an even number of columns, got ", width);
    auto factors = side_by_side(lora_A, first, features, width, dtype);
    auto low = seed ? at::zeros_like(dx, at::MemoryFormat::Contiguous) : dx;
    auto &with = products_of(dx);
    int threads = at::get_num_threads();
    with.expand(matrix("dX", low, dtype, N, features), matrix("dS", ds, dtype, N, width), factors, 1.0, nullptr,
                threads);
    if (seed)
        with.drop(matrix("low", low, dtype, N, features), matrix("dX", dx, dtype, N, features), key_of(*seed),
                  dropped_below(dropout), true, threads);
}

// Whole passes of a group. `parts`: weight, bias, lora_A, lora_B of each module, or None.

struct Group {
    std::vector<Tensor> weight, bias, A, B; // undefined: absent
    std::vector<int64_t> modules, first;    // those with a rank, and their first columns of S
    int64_t width = 0;
    bool native;

    Group(const OptionalTensors &parts, const Tensor &x, int64_t padding, bool with_B = true)
        : native(is_native(x))
    {
        int64_t M = parts.size() / 4;
        TORCH_CHECK(M * 4 == (int64_t)parts.size(), "adarank: four tensors for each module");
        TORCH_CHECK(padding > 0, "adarank: padding must be positive, got ", padding);
        weight.resize(M), bias.resize(M), A.resize(M), B.resize(M);
        for (int64_t m = 0; m < M; m++) {
            weight[m] = parts.get(4 * m).value_or(Tensor());
            bias[m] = parts.get(4 * m + 1).value_or(Tensor());
            A[m] = parts.get(4 * m + 2).value_or(Tensor());
            B[m] = parts.get(4 * m + 3).value_or(Tensor());
            if (!A[m].defined() || !A[m].size(0))
                continue;
            modules.push_back(m), first.push_back(width);
            int64_t rank = A[m].size(0);
            TORCH_CHECK(B[m].defined() ? rank_of(B[m]) == rank : !with_B, "adarank: lora_A has ", rank,
                        " ranks, lora_B ", B[m].defined() ? rank_of(B[m]) : 0);
            width += native ? padded(rank, x.scalar_type()) : (rank + padding - 1) / padding * padding;
        }
    }

    static bool is_native(const Tensor &x) { return x.device().is_cpu() && products(x.scalar_type()); }

    // A of all modules as rows of one matrix in the order of S's columns; what pads it meets zeros in dS.
    Tensor packed(at::ScalarType dtype) const
    {
        std::vector<Tensor> pieces;
        for (size_t i = 0; i < modules.size(); i++) {
            auto &a = A[modules[i]];
            int64_t end = i + 1 < first.size() ? first[i + 1] : width, more = end - first[i] - a.size(0);
            pieces.push_back(a);
            for (; more > 0; more -= a.size(0))
                pieces.push_back(a.narrow(0, 0, std::min(more, a.size(0))));
        }
        auto all = pieces.size() == 1 ? pieces[0] : at::cat(pieces);
        return all.to(dtype);
    }

    std::vector<Tensor> adapters() const
    {
        std::vector<Tensor> found;
        for (auto m : modules)
            found.push_back(A[m]);
        return found;
    }
};

bool wants(int64_t bits, int64_t m) { return bits >> m & 1; }

// Outputs of all modules, then S (and on a GPU A as it was packed). With `add` false the low-rank products
// are left to the caller, who gets S as it was given. `bases`: products of foreign base layers, or none; bit m
// of `owned`: module m's may be written into.
std::vector<Tensor> group_forward(const Tensor &x, const OptionalTensors &parts, const OptionalTensors &bases,
                                  int64_t owned, at::ArrayRef<double> scalings, double dropout,
                                  const std::optional<Tensor> &seed, int64_t padding, bool add,
                                  const std::optional<Tensor> &given_S)
{
    at::AutoDispatchBelowADInplaceOrView guard;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    Group g(parts, x, padding);
    auto dtype = x.scalar_type();
    TORCH_CHECK(scalings.size() == g.weight.size(), "adarank: one scaling for each module");
    std::vector<Tensor> out;
    out.reserve(g.weight.size() + 2);
    Tensor X = rows_of(x), S, A;
    if (!g.modules.empty()) {
        if (g.native) {
            X = ordered(X);
            S = shrink(X, g.adapters(), g.first, g.width, seed, dropout);
        } else if (given_S) {
            S = *given_S;
        } else {
            A = g.packed(dtype);
            S = at::mm(X, A.t());
        }
    }
    size_t next = 0;
    for (size_t m = 0; m < g.weight.size(); m++) {
        bool adapted = next < g.modules.size() && g.modules[next] == (int64_t)m;
        std::optional<Tensor> bias;
        if (g.bias[m].defined())
            bias = g.bias[m];
        bool late = adapted && g.native && bias && bias->is_contiguous();
        auto base = bases.empty() ? std::optional<Tensor>() : bases.get(m);
        Tensor Y;
        if (base) {
            TORCH_CHECK(base->scalar_type() == dtype && base->size(-1) > 0, "adarank: base product of ",
                        base->scalar_type(), " for ", dtype);
            Y = rows_of(*base);
            if (!wants(owned, m))
                Y = Y.clone(at::MemoryFormat::Contiguous);
            late = false;
        } else {
            TORCH_CHECK(g.weight[m].defined(), "adarank: module ", m, " has neither weight nor base product");
            Y = at::linear(X, g.weight[m], late ? std::optional<Tensor>() : bias);
        }
        if (adapted && add) {
            if (g.native)
                expand_(Y, S, g.B[m], g.first[next], scalings[m], late ? bias : std::optional<Tensor>());
            else
                Y.addmm_(S.narrow(1, g.first[next], g.A[m].size(0)), g.B[m].to(dtype).t(), 1.0, scalings[m]);
        }
        next += adapted;
        if (base && wants(owned, m)) {
            Y = *base;
        } else if (x.dim() != 2) {
            auto shape = x.sizes().vec();
            shape.back() = Y.size(1);
            Y = at::_unsafe_view(Y, shape); // as in F.linear: a view could not be changed in place
        }
        out.push_back(std::move(Y));
    }
    out.push_back(S);
    out.push_back(A);
    return out;
}

// Gradients of x, of the lora_A and then the lora_B of the modules with a rank; undefined where not needed.
// With dropout on a GPU `dropped` is drop(X), and the last is dS A, which the caller drops and adds to the
// first. Bit m of need_A
// and need_B is module m's.
std::vector<Tensor> group_backward(const OptionalTensors &dys, const std::optional<Tensor> &x,
                                   const std::optional<Tensor> &S, const std::optional<Tensor> &packed,
                                   const OptionalTensors &parts, at::ArrayRef<double> scalings, double dropout,
                                   const std::optional<Tensor> &seed, int64_t padding,
                                   const std::optional<Tensor> &dropped, bool need_x, int64_t need_A, int64_t need_B,
                                   at::IntArrayRef x_shape)
{
    at::AutoDispatchBelowADInplaceOrView guard;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    int64_t M = dys.size();
    TORCH_CHECK(M < 64, "adarank: at most 63 modules in a group, got ", M);
    Tensor like;
    std::vector<Tensor> dY(M);
    for (int64_t m = 0; m < M; m++)
        if (auto dy = dys.get(m); dy.has_value() && dy->defined()) {
            dY[m] = rows_of(*dy);
            if (!like.defined())
                like = dY[m];
        }
    if (!like.defined())
        return {};
    Group g(parts, like, padding);
    TORCH_CHECK((int64_t)g.weight.size() == M && (int64_t)scalings.size() == M,
                "adarank: one module and one scaling for each gradient");
    size_t count = g.modules.size();
    std::vector<Tensor> grads(2 + 2 * count);
    auto dtype = like.scalar_type();
    int64_t N = like.size(0);
    if (g.native)
        for (auto &dy : dY)
            if (dy.defined())
                dy = ordered(dy);
    Tensor dX;
    for (int64_t m = 0; m < M; m++)
        if (need_x && dY[m].defined() && g.weight[m].defined())
            dX = dX.defined() ? dX.addmm_(dY[m], g.weight[m]) : at::mm(dY[m], g.weight[m]);
    bool any_A = false, complete = true;
    std::vector<int64_t> first, ranks; // of the modules whose dS is needed, in a matrix of their own
    std::vector<int64_t> through;
    std::vector<size_t> position; // theirs among the modules with a rank
    std::vector<Tensor> As;
    int64_t width = 0;
    for (size_t i = 0; i < g.modules.size(); i++) {
        int64_t m = g.modules[i], rank = g.A[m].size(0);
        if (!dY[m].defined() || !(need_x || wants(need_A, m))) {
            complete = false;
            continue;
        }
        int64_t end = i + 1 < g.first.size() ? g.first[i + 1] : g.width;
        through.push_back(m), position.push_back(i), first.push_back(width), ranks.push_back(rank), As.push_back(g.A[m]);
        width += end - g.first[i];
        any_A = any_A || wants(need_A, m);
    }
    for (size_t i = 0; i < g.modules.size(); i++) {
        int64_t m = g.modules[i], rank = g.A[m].size(0);
        if (!dY[m].defined() || !wants(need_B, m))
            continue;
        TORCH_CHECK(S.has_value(), "adarank: S is needed for the gradient of lora_B");
        auto &dB = grads[1 + count + i];
        if (g.native) {
            dB = grad_b(dY[m], *S, g.first[i], rank, scalings[m], g.B[m].scalar_type());
        } else {
            dB = at::empty({dY[m].size(1), rank}, like.options());
            dB.addmm_(dY[m].t(), S->narrow(1, g.first[i], rank), 0.0, scalings[m]);
            dB = dB.to(g.B[m].scalar_type());
        }
    }
    if (!through.empty()) {
        bool gaps = false;
        for (size_t i = 0; i < through.size(); i++)
            gaps = gaps || (i + 1 < first.size() ? first[i + 1] : width) != first[i] + ranks[i];
        auto dS = gaps && !g.native ? at::zeros({N, width}, like.options()) : at::empty({N, width}, like.options());
        for (size_t i = 0; i < through.size(); i++) {
            int64_t m = through[i];
            if (g.native)
                grad_s_(dS, dY[m], g.B[m], first[i], scalings[m]);
            else
                dS.narrow(1, first[i], ranks[i]).addmm_(dY[m], g.B[m].to(dtype), 0.0, scalings[m]);
        }
        if (need_x) {
            if (g.native) {
                if (!dX.defined())
                    dX = at::zeros({N, As[0].size(1)}, like.options());
                grad_x_(dX, dS, As, first, seed, dropout);
            } else {
                Tensor A = packed && complete ? *packed : Tensor();
                if (!A.defined()) {
                    OptionalTensors some;
                    for (auto m : through)
                        for (auto &t : {Tensor(), Tensor(), g.A[m], Tensor()})
                            some.push_back(t.defined() ? std::optional<Tensor>(t) : std::nullopt);
                    A = Group(some, like, padding, false).packed(dtype);
                }
                if (seed)
                    grads[1 + 2 * count] = at::mm(dS, A);
                else
                    dX = dX.defined() ? dX.addmm_(dS, A) : at::mm(dS, A);
            }
        }
        if (any_A) {
            TORCH_CHECK(x.has_value(), "adarank: x is needed for the gradient of lora_A");
            auto X = rows_of(*x);
            if (g.native) {
                bool one = true;
                for (auto &a : As)
                    one = one && a.scalar_type() == As[0].scalar_type();
                auto dA = grad_a(dS, X, first, ranks, one ? As[0].scalar_type() : at::kFloat, seed, dropout);
                for (size_t i = 0; i < through.size(); i++)
                    if (wants(need_A, through[i]))
                        grads[1 + position[i]] = dA[i].to(As[i].scalar_type());
            } else {
                auto all = at::mm(dS.t(), dropped ? *dropped : X);
                for (size_t i = 0; i < through.size(); i++)
                    if (wants(need_A, through[i]))
                        grads[1 + position[i]] = all.narrow(0, first[i], ranks[i]).to(As[i].scalar_type());
            }
        }
    }
    if (dX.defined())
        grads[0] = dX.view(x_shape);
    return grads;
}

// A whole group as one autograd node.

struct Call : torch::CustomClassHolder { // what the backward pass needs beside tensors
    std::vector<double> scalings;
    std::vector<int64_t> shape, modules; // the modules with foreign base products
    double dropout;
    int64_t padding, M;
};

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct GroupNode : torch::autograd::Function<GroupNode> {
    // `adapters`: A and then B of the modules with a rank; `foreign`: the base products that there are.
    static variable_list forward(AutogradContext *ctx, const Tensor &x, at::TensorList adapters,
                                 at::TensorList foreign, const OptionalTensors *parts,
                                 const OptionalTensors *bases, int64_t owned, at::ArrayRef<double> scalings,
                                 double dropout, const std::optional<Tensor> *seed, int64_t padding, bool add)
    {
        auto out = group_forward(x, *parts, *bases, owned, scalings, dropout, *seed, padding, add, std::nullopt);
        auto packed = out.back();
        out.pop_back();
        auto S = out.back();
        out.pop_back();
        int64_t M = out.size(), count = adapters.size() / 2;
        // not `needs_input_grad`: in a forward that checkpointing repeats inside `autograd.grad(y, inputs)`
        // it answers for that backward pass, and a node made there has no part in it
        bool need_x = x.requires_grad(), need_A = false, need_B = false;
        for (int64_t i = 0; i < count; i++) {
            need_A = need_A || adapters[i].requires_grad();
            need_B = need_B || adapters[count + i].requires_grad();
        }
        auto call = c10::make_intrusive<Call>();
        variable_list saved;
        saved.reserve(4 + 3 * M);
        saved.push_back(need_A ? x : Tensor());
        saved.push_back(need_B ? S : Tensor());
        saved.push_back(need_x ? packed : Tensor());
        saved.push_back(seed->value_or(Tensor()));
        for (int64_t m = 0; m < M; m++) {
            saved.push_back(need_x ? parts->get(4 * m).value_or(Tensor()) : Tensor());
            saved.push_back(parts->get(4 * m + 2).value_or(Tensor()));
            saved.push_back(parts->get(4 * m + 3).value_or(Tensor()));
        }
        ctx->save_for_backward(std::move(saved));
        call->scalings = scalings.vec(), call->shape = x.sizes().vec(), call->M = M;
        call->dropout = dropout, call->padding = padding;
        variable_list dirty;
        for (size_t m = 0; m < bases->size(); m++)
            if (auto base = bases->get(m)) {
                call->modules.push_back(m);
                if (wants(owned, m))
                    dirty.push_back(*base);
            }
        if (!dirty.empty())
            ctx->mark_dirty(dirty);
        ctx->saved_data["call"] = c10::IValue::make_capsule(call);
        ctx->set_materialize_grads(false);
        if (!add) { // the caller adds the low-rank products
            ctx->mark_non_differentiable({S});
            out.push_back(S);
        }
        return out;
    }

    static variable_list backward(AutogradContext *ctx, variable_list dYs)
    {
        auto saved = ctx->get_saved_variables();
        auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
        auto optional = [](const Tensor &t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; };
        OptionalTensors parts, dys;
        int64_t count = 0;
        for (int64_t m = 0; m < call->M; m++) {
            parts.push_back(optional(saved[4 + 3 * m]));
            parts.push_back(std::nullopt);
            parts.push_back(optional(saved[5 + 3 * m]));
            parts.push_back(optional(saved[6 + 3 * m]));
            dys.push_back(optional(dYs[m]));
            count += saved[5 + 3 * m].defined() && saved[5 + 3 * m].size(0);
        }
        int64_t need_A = 0, need_B = 0, i = 0;
        for (int64_t m = 0; m < call->M; m++)
            if (saved[5 + 3 * m].defined() && saved[5 + 3 * m].size(0)) {
                need_A |= (int64_t)ctx->needs_input_grad(1 + i) << m;
                need_B |= (int64_t)ctx->needs_input_grad(1 + count + i) << m;
                i++;
            }
        auto grads = group_backward(dys, optional(saved[0]), optional(saved[1]), optional(saved[2]), parts,
                                    call->scalings, call->dropout, optional(saved[3]), call->padding,
                                    std::nullopt, ctx->needs_input_grad(0), need_A, need_B, call->shape);
        grads.resize(1 + 2 * count); // without what only a GPU's dropout needs
        if (at::GradMode::is_enabled())
            grads = once(std::move(grads));
        for (auto m : call->modules)
            grads.push_back(dYs[m]);
        grads.resize(grads.size() + 8); // the arguments that are no tensors
        return grads;
    }

    // With create_graph: gradients that refuse to be differentiated.
    static variable_list once(variable_list grads)
    {
        variable_list defined;
        for (auto &grad : grads)
            if (grad.defined()) {
                grad = grad.detach();
                grad.set_requires_grad(true);
                defined.push_back(grad);
            }
        auto refuse = std::make_shared<torch::autograd::DelayedError>(
            "a fused LoRA layer cannot be differentiated twice; adarank_fast.restore gives plain PEFT back",
            defined.size());
        auto refusing = (*refuse)(std::move(defined));
        size_t next = 0;
        for (auto &grad : grads)
            if (grad.defined())
                grad = refusing[next++];
        return grads;
    }
};

// The outputs of all modules; with `add` false, then S.
std::vector<Tensor> group_linear(const Tensor &x, const OptionalTensors &parts, const OptionalTensors &bases,
                                 int64_t owned, at::ArrayRef<double> scalings, double dropout,
                                 const std::optional<Tensor> &seed, int64_t padding, bool add)
{
    auto out = group_forward(x, parts, bases, owned, scalings, dropout, seed, padding, add, std::nullopt);
    out.resize(out.size() - (add ? 2 : 1));
    return out;
}

std::vector<Tensor> group_linear_autograd(const Tensor &x, const OptionalTensors &parts,
                                          const OptionalTensors &bases, int64_t owned,
                                          at::ArrayRef<double> scalings, double dropout,
                                          const std::optional<Tensor> &seed, int64_t padding, bool add)
{
    std::vector<Tensor> adapters, foreign;
    bool wanted = x.requires_grad();
    for (int64_t of = 2; of < 4; of++)
        for (size_t i = 0; i < parts.size(); i += 4)
            if (auto A = parts.get(i + 2); A && A->size(0)) {
                adapters.push_back(*parts.get(i + of));
                wanted = wanted || adapters.back().requires_grad();
            }
    for (std::optional<Tensor> base : bases)
        if (base) {
            foreign.push_back(*base);
            wanted = wanted || base->requires_grad();
        }
    if (!wanted || !at::GradMode::is_enabled())
        return group_linear(x, parts, bases, owned, scalings, dropout, seed, padding, add);
    return GroupNode::apply(x, at::TensorList(adapters), at::TensorList(foreign), &parts, &bases, owned, scalings,
                            dropout, &seed, padding, add);
}

// int32 [4, rows, n]: the words of counters (c0 + i, c1 + row, 0, 0) under the key; c0 carries into c1.
Tensor philox(int64_t key, int64_t c0, int64_t c1, int64_t rows, int64_t n)
{
    TORCH_CHECK(rows >= 0 && n >= 0, "adarank: philox of [", rows, ", ", n, "]");
    auto words = at::empty({4, rows, n}, at::TensorOptions().dtype(at::kInt));
    auto out = (uint32_t *)words.data_ptr();
    int64_t plane = rows * n;
    for (int64_t row = 0; row < rows; row++, out += n)
        for (int64_t i = 0; i < n; i++) {
            uint64_t counter = (uint64_t)c0 + (((uint64_t)c1 + (uint64_t)row) << 32) + (uint64_t)i;
            uint32_t k0 = (uint32_t)key, k1 = (uint32_t)((uint64_t)key >> 32);
            uint32_t a = (uint32_t)counter, b = (uint32_t)(counter >> 32), c = 0, d = 0;
            for (int round = 0; round < 10; round++) {
                uint64_t p0 = (uint64_t)a * 0xD2511F53u, p1 = (uint64_t)c * 0xCD9E8D57u;
                a = (uint32_t)(p1 >> 32) ^ b ^ k0, b = (uint32_t)p1;
                c = (uint32_t)(p0 >> 32) ^ d ^ k1, d = (uint32_t)p0;
                k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
            }
            out[i] = a, out[i + plane] = b, out[i + 2 * plane] = c, out[i + 3 * plane] = d;
        }
    return words;
}

// In-place operators bump the version of what they write, their first argument, as aten's do. Boxed: a
// compiler's symbolic numbers pass through.
void bump(const c10::OperatorHandle &op, c10::DispatchKeySet keys, torch::jit::Stack *stack)
{
    auto written = (*stack)[stack->size() - op.schema().arguments().size()].toTensor();
    {
        at::AutoDispatchBelowADInplaceOrView guard;
        op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
    }
    written.unsafeGetTensorImpl()->bump_version();
}

} // namespace

TORCH_LIBRARY(adarank, m)
{
    m.def("drop(Tensor x, Tensor seed, float dropout) -> Tensor");
    m.def("shrink(Tensor x, Tensor[] lora_A, SymInt[] first, SymInt width, Tensor? seed, float dropout) -> Tensor");
    m.def("expand_(Tensor(a!) y, Tensor s, Tensor lora_B, SymInt first, float scaling, Tensor? bias) -> ()");
    m.def("grad_s_(Tensor(a!) ds, Tensor dy, Tensor lora_B, SymInt first, float scaling) -> ()");
    m.def("grad_b(Tensor dy, Tensor s, SymInt first, SymInt rank, float scaling, ScalarType dtype) -> Tensor");
    m.def("grad_a(Tensor ds, Tensor x, SymInt[] first, SymInt[] ranks, ScalarType dtype, Tensor? seed, float dropout)"
          " -> Tensor[]");
    m.def("grad_x_(Tensor(a!) dx, Tensor ds, Tensor[] lora_A, SymInt[] first, Tensor? seed, float dropout) -> ()");
    m.def("group_forward(Tensor x, Tensor?[] parts, Tensor?[] bases, int owned, float[] scalings, float dropout,"
          " Tensor? seed, int padding, bool add, Tensor? S) -> Tensor[]");
    m.def("group_backward(Tensor?[] dys, Tensor? x, Tensor? S, Tensor? packed, Tensor?[] parts, float[] scalings,"
          " float dropout, Tensor? seed, int padding, Tensor? dropped, bool need_x, int need_A, int need_B,"
          " int[] x_shape) -> Tensor[]");
    m.def("group_linear(Tensor x, Tensor?[] parts, Tensor?[] bases, int owned, float[] scalings, float dropout,"
          " Tensor? seed, int padding, bool add) -> Tensor[]");
    m.def("philox(int key, int c0, int c1, int rows, int n) -> Tensor");
    m.def("knows(ScalarType dtype) -> bool");
}

TORCH_LIBRARY_IMPL(adarank, CPU, m)
{
    m.impl("drop", TORCH_FN(drop));
    m.impl("shrink", TORCH_FN(shrink));
    m.impl("expand_", TORCH_FN(expand_));
    m.impl("grad_s_", TORCH_FN(grad_s_));
    m.impl("grad_b", TORCH_FN(grad_b));
    m.impl("grad_a", TORCH_FN(grad_a));
    m.impl("grad_x_", TORCH_FN(grad_x_));
}

TORCH_LIBRARY_IMPL(adarank, CompositeExplicitAutograd, m)
{
    m.impl("group_linear", TORCH_FN(group_linear));
    m.impl("group_forward", TORCH_FN(group_forward));
    m.impl("group_backward", TORCH_FN(group_backward));
    m.impl("philox", TORCH_FN(philox));
    m.impl("knows", [](at::ScalarType dtype) { return products(dtype) != nullptr; });
}

TORCH_LIBRARY_IMPL(adarank, Autograd, m)
{
    m.impl("group_linear", TORCH_FN(group_linear_autograd));
}

TORCH_LIBRARY_IMPL(adarank, ADInplaceOrView, m)
{
    m.impl("expand_", torch::CppFunction::makeFromBoxedFunction<&bump>());
    m.impl("grad_s_", torch::CppFunction::makeFromBoxedFunction<&bump>());
    m.impl("grad_x_", torch::CppFunction::makeFromBoxedFunction<&bump>());
}
