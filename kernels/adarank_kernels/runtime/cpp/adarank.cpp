// The LoRA linears' products with few ranks on the CPU, whole passes of a group for any device, and
// Philox words.
//
// Every function that PyTorch calls is an operator of the library `adarank`, with a schema that says what
// it mutates; in-place operators bump the version of what they write. The passes (`group_forward`,
// `group_backward`) call aten for the base products and must therefore not run where somebody watches
// operators (a dispatch mode): Python sees to that and does the same step by step.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
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

#include "group.h"

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
          " int[] x_shape, Tensor? dS) -> Tensor[]");
    m.def("make_group(Tensor like, Tensor?[] parts, float[] scalings, float dropout, int padding) -> int");
    m.def("free_group(int group) -> ()");
    m.def("group_linear(Tensor x, int group, Tensor? seed, Tensor?[] bases, int owned, int bound) -> Tensor[]",
          TORCH_FN(group_linear));
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
    m.impl("make_group", TORCH_FN(make_group));
    m.impl("free_group", TORCH_FN(free_group));
    m.impl("group_forward", TORCH_FN(group_forward));
    m.impl("group_backward", TORCH_FN(group_backward));
    m.impl("philox", TORCH_FN(philox));
    m.impl("knows", [](at::ScalarType dtype) { return products(dtype) != nullptr; });
}

TORCH_LIBRARY_IMPL(adarank, ADInplaceOrView, m)
{
    m.impl("expand_", torch::CppFunction::makeFromBoxedFunction<&bump>());
    m.impl("grad_s_", torch::CppFunction::makeFromBoxedFunction<&bump>());
    m.impl("grad_x_", torch::CppFunction::makeFromBoxedFunction<&bump>());
}
