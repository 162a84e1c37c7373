// Whole passes of a group of LoRA linears, for any device, and their autograd node. The maths is in lora/op.py.
//
// The passes call aten for the base products and must therefore not run where somebody watches operators (a
// dispatch mode): Python sees to that and does the same step by step.

struct Parts { // of each module; undefined: absent
    std::vector<Tensor> weight, bias, A, B;

    explicit Parts(size_t M) : weight(M), bias(M), A(M), B(M) {}

    explicit Parts(const OptionalTensors &parts) : Parts(parts.size() / 4)
    {
        TORCH_CHECK(weight.size() * 4 == parts.size(), "adarank: four tensors for each module");
        for (size_t m = 0; m < weight.size(); m++) {
            weight[m] = parts.get(4 * m).value_or(Tensor());
            bias[m] = parts.get(4 * m + 1).value_or(Tensor());
            A[m] = parts.get(4 * m + 2).value_or(Tensor());
            B[m] = parts.get(4 * m + 3).value_or(Tensor());
        }
    }
};

struct Layout { // of S
    std::vector<int64_t> modules, ranks, first; // those with a rank, and their first columns
    int64_t width = 0;
    bool native;

    Layout(const Parts &parts, const Tensor &x, int64_t padding)
        : native(x.device().is_cpu() && products(x.scalar_type()))
    {
        TORCH_CHECK(padding > 0, "adarank: padding must be positive, got ", padding);
        for (size_t m = 0; m < parts.A.size(); m++) {
            auto &A = parts.A[m], &B = parts.B[m];
            int64_t rank = A.defined() ? A.size(0) : 0;
            if (!rank)
                continue;
            TORCH_CHECK(B.defined() && rank_of(B) == rank, "adarank: lora_A has ", rank, " ranks, lora_B ",
                        B.defined() ? rank_of(B) : 0);
            modules.push_back(m), ranks.push_back(rank), first.push_back(width);
            width += native ? padded(rank, x.scalar_type()) : (rank + padding - 1) / padding * padding;
        }
    }

    int64_t end(size_t i) const { return i + 1 < first.size() ? first[i + 1] : width; }
};

struct Group : Parts, Layout {
    Group(Parts &&parts, const Tensor &x, int64_t padding) : Parts(std::move(parts)), Layout(*this, x, padding) {}
    Group(Parts &&parts, const Layout &layout) : Parts(std::move(parts)), Layout(layout) {}

    // A of these modules as rows of one matrix in the order of S's columns; what pads it meets zeros in dS.
    Tensor packed(at::ScalarType dtype, const std::vector<size_t> *some = nullptr) const
    {
        std::vector<Tensor> pieces;
        for (size_t at = 0; at < (some ? some->size() : modules.size()); at++) {
            size_t i = some ? (*some)[at] : at;
            auto &a = A[modules[i]];
            pieces.push_back(a);
            for (int64_t more = end(i) - first[i] - ranks[i]; more > 0; more -= ranks[i])
                pieces.push_back(a.narrow(0, 0, std::min(more, ranks[i])));
        }
        auto all = pieces.size() == 1 ? pieces[0] : at::cat(pieces);
        return all.scalar_type() == dtype ? all : all.to(dtype);
    }

    // B of the modules with a rank, in the compute dtype.
    std::vector<Tensor> cast_B(at::ScalarType dtype) const
    {
        std::vector<Tensor> all, from, to;
        for (auto m : modules) {
            all.push_back(B[m]);
            if (B[m].scalar_type() != dtype) {
                all.back() = at::empty(B[m].sizes(), B[m].options().dtype(dtype));
                from.push_back(B[m]), to.push_back(all.back());
            }
        }
        if (from.size() == 1)
            to[0].copy_(from[0]);
        else if (!from.empty())
            at::_foreach_copy_(to, from);
        return all;
    }

    std::vector<Tensor> lora_A() const
    {
        std::vector<Tensor> found;
        for (auto m : modules)
            found.push_back(A[m]);
        return found;
    }
};

bool wants(int64_t bits, int64_t m) { return bits >> m & 1; }

Tensor columns(const Tensor &s, int64_t first, int64_t count)
{
    return s.size(1) == count ? s : s.narrow(1, first, count);
}

Tensor defined_or_empty(const std::optional<Tensor> &tensor) { return tensor.value_or(Tensor()); }

// s a b.
Tensor scaled_mm(const Tensor &a, const Tensor &b, double scaling)
{
    if (scaling == 1)
        return at::mm(a, b);
    auto product = at::empty({a.size(0), b.size(1)}, a.options());
    return product.addmm_(a, b, 0.0, scaling);
}

// What stands for a dropout mask: a seed, or the mask itself in the compute dtype.
bool is_mask(const Tensor &seed) { return seed.defined() && seed.scalar_type() != at::kLong; }

struct Passed { // forward
    std::vector<Tensor> Y, B; // outputs of all modules; B of those with a rank in the compute dtype
    Tensor S, A, dropped;     // A as it was packed, if it was; x under a mask
};

// With `add` false the low-rank products are left to the caller, who gets S as it was given. `bases`: products of
// foreign base layers, or none; bit m of `owned`: module m's may be written into.
Passed forward_pass(const Group &g, const Tensor &x, const std::vector<Tensor> &bases, int64_t owned,
                    at::ArrayRef<double> scalings, double dropout, const Tensor &seed, bool add,
                    const Tensor &given_S)
{
    at::AutoDispatchBelowADInplaceOrView guard;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    auto dtype = x.scalar_type();
    TORCH_CHECK(scalings.size() == g.weight.size(), "adarank: one scaling for each module");
    Passed out;
    out.Y.reserve(g.weight.size() + 1);
    Tensor X = rows_of(x);
    if (!g.modules.empty()) {
        if (g.native) {
            X = ordered(X);
            out.S = shrink(X, g.lora_A(), g.first, g.width, seed.defined() ? std::optional<Tensor>(seed) : std::nullopt,
                           dropout);
        } else if (given_S.defined()) {
            out.S = given_S;
        } else {
            TORCH_CHECK(!seed.defined() || is_mask(seed), "adarank: S must be given with a seed here");
            out.A = g.packed(dtype);
            if (seed.defined())
                out.dropped = at::mul(X, seed);
            out.S = at::mm(seed.defined() ? out.dropped : X, out.A.t());
        }
        if (!g.native && add)
            out.B = g.cast_B(dtype);
    }
    size_t next = 0;
    for (size_t m = 0; m < g.weight.size(); m++) {
        bool adapted = next < g.modules.size() && g.modules[next] == (int64_t)m;
        auto &bias = g.bias[m];
        bool late = adapted && g.native && bias.defined() && bias.is_contiguous();
        bool foreign = !bases.empty() && bases[m].defined(), own = foreign && wants(owned, m);
        Tensor Y;
        if (foreign) {
            TORCH_CHECK(bases[m].scalar_type() == dtype && bases[m].size(-1) > 0, "adarank: base product of ",
                        bases[m].scalar_type(), " for ", dtype);
            Y = rows_of(bases[m]);
            if (!own)
                Y = Y.clone(at::MemoryFormat::Contiguous);
            late = false;
        } else {
            TORCH_CHECK(g.weight[m].defined(), "adarank: module ", m, " has neither weight nor base product");
            Y = bias.defined() && !late ? at::addmm(bias, X, g.weight[m].t()) : at::mm(X, g.weight[m].t());
        }
        if (adapted && add) {
            if (g.native)
                expand_(Y, out.S, g.B[m], g.first[next], scalings[m], late ? std::optional<Tensor>(bias) : std::nullopt);
            else
                Y.addmm_(columns(out.S, g.first[next], g.ranks[next]), out.B[next].t(), 1.0, scalings[m]);
        }
        next += adapted;
        if (own) {
            Y = bases[m];
        } else if (x.dim() != 2) {
            c10::DimVector shape(x.sizes());
            shape.back() = Y.size(1);
            Y = at::_unsafe_view(Y, shape); // as in F.linear: a view could not be changed in place
        }
        out.Y.push_back(std::move(Y));
    }
    return out;
}

// Gradients of x, of the lora_A and then the lora_B of the modules with a rank; undefined where not needed. With a
// seed on a GPU `dropped` is drop(X), and the last is dS A, which the caller drops and adds to the first. Bit m of
// need_A and need_B is module m's. `low_B`: lora_B of the modules with a rank in the compute dtype, or none. `given_dS`:
// dS of the modules that it is needed for, or none.
std::vector<Tensor> backward_pass(const Group &g, std::vector<Tensor> &&dY, const Tensor &x, const Tensor &S,
                                  const Tensor &packed, const std::vector<Tensor> &low_B,
                                  at::ArrayRef<double> scalings, double dropout, const Tensor &seed, Tensor dropped,
                                  bool need_x, int64_t need_A, int64_t need_B, at::IntArrayRef x_shape,
                                  const Tensor &given_dS)
{
    int64_t M = dY.size();
    Tensor like;
    for (auto &dy : dY)
        if (dy.defined()) {
            dy = g.native ? ordered(rows_of(dy)) : rows_of(dy);
            like = like.defined() ? like : dy;
        }
    TORCH_CHECK((int64_t)g.weight.size() == M && (int64_t)scalings.size() == M,
                "adarank: one module and one scaling for each gradient");
    size_t count = g.modules.size();
    std::vector<Tensor> grads(2 + 2 * count);
    auto dtype = like.scalar_type();
    int64_t N = like.size(0);
    std::optional<Tensor> key = seed.defined() ? std::optional<Tensor>(seed) : std::nullopt;
    Tensor dX;
    for (int64_t m = 0; m < M; m++)
        if (need_x && dY[m].defined() && g.weight[m].defined())
            dX = dX.defined() ? dX.addmm_(dY[m], g.weight[m]) : at::mm(dY[m], g.weight[m]);
    // Of the modules whose dS is needed, in a matrix of their own.
    std::vector<size_t> through; // theirs among the modules with a rank
    std::vector<int64_t> first, ranks;
    std::vector<Tensor> As, Bs;
    int64_t width = 0;
    bool any_A = false, complete = true, gaps = false, exact = true;
    for (size_t i = 0; i < count; i++) {
        int64_t m = g.modules[i];
        if (!dY[m].defined() || !(need_x || wants(need_A, m))) {
            complete = false;
            continue;
        }
        through.push_back(i), first.push_back(width), ranks.push_back(g.ranks[i]), As.push_back(g.A[m]);
        width += g.end(i) - g.first[i];
        gaps = gaps || g.end(i) - g.first[i] != g.ranks[i];
        any_A = any_A || wants(need_A, m);
    }
    std::vector<int64_t> trained; // whose dB is needed
    int64_t numbers = 0;
    for (size_t i = 0; i < count; i++) {
        int64_t m = g.modules[i];
        if (!dY[m].defined() || !wants(need_B, m))
            continue;
        trained.push_back(i), numbers += dY[m].size(1) * g.ranks[i];
        exact = exact && g.B[m].scalar_type() == dtype;
    }
    TORCH_CHECK(trained.empty() || S.defined(), "adarank: S is needed for the gradient of lora_B");
    // Gradients that are cast lie in one buffer, so that one launch casts them all.
    Tensor buffer = trained.size() > 1 && !exact && !g.native ? at::empty({numbers}, like.options()) : Tensor();
    int64_t start = 0;
    for (auto i : trained) {
        int64_t m = g.modules[i], rank = g.ranks[i], out = dY[m].size(1);
        auto &dB = grads[1 + count + i];
        if (g.native) {
            dB = grad_b(dY[m], S, g.first[i], rank, scalings[m], g.B[m].scalar_type());
            continue;
        }
        auto S_m = columns(S, g.first[i], rank);
        if (buffer.defined()) {
            dB = buffer.as_strided({out, rank}, {rank, 1}, start);
            dB.addmm_(dY[m].t(), S_m, 0.0, scalings[m]);
        } else {
            dB = scaled_mm(dY[m].t(), S_m, scalings[m]);
        }
        start += out * rank;
    }
    if (!exact && !g.native) {
        auto to = g.B[g.modules[trained[0]]].scalar_type();
        bool one = buffer.defined();
        for (auto i : trained)
            one = one && g.B[g.modules[i]].scalar_type() == to;
        auto all = one ? buffer.to(to) : Tensor();
        for (auto i : trained) {
            auto &dB = grads[1 + count + i];
            dB = one ? all.as_strided(dB.sizes(), dB.strides(), dB.storage_offset())
                     : dB.to(g.B[g.modules[i]].scalar_type());
        }
    }
    if (!through.empty()) {
        TORCH_CHECK(!given_dS.defined() || (given_dS.sizes() == at::IntArrayRef({N, width}) && !g.native),
                    "adarank: dS of ", N, " rows and ", width, " columns is needed");
        Tensor dS = given_dS;
        if (!g.native && !dS.defined() && low_B.empty())
            Bs = g.cast_B(dtype);
        auto &of_B = low_B.empty() ? Bs : low_B;
        bool each = g.native || gaps || through.size() > 1;
        if (dS.defined())
            each = false;
        else if (!each)
            dS = scaled_mm(dY[g.modules[through[0]]], of_B[through[0]], scalings[g.modules[through[0]]]);
        else
            dS = gaps && !g.native ? at::zeros({N, width}, like.options()) : at::empty({N, width}, like.options());
        for (size_t at = 0; each && at < through.size(); at++) {
            size_t i = through[at];
            int64_t m = g.modules[i];
            if (g.native)
                grad_s_(dS, dY[m], g.B[m], first[at], scalings[m]);
            else
                columns(dS, first[at], ranks[at]).addmm_(dY[m], of_B[i], 0.0, scalings[m]);
        }
        if (need_x && g.native) {
            if (!dX.defined())
                dX = at::zeros({N, As[0].size(1)}, like.options());
            grad_x_(dX, dS, As, first, key, dropout);
        } else if (need_x) {
            auto A = packed.defined() && complete ? packed : g.packed(dtype, &through);
            if (!seed.defined()) {
                dX = dX.defined() ? dX.addmm_(dS, A) : at::mm(dS, A);
            } else {
                auto low = at::mm(dS, A);
                if (!is_mask(seed))
                    grads[1 + 2 * count] = low;
                else
                    dX = dX.defined() ? dX.addcmul_(low, seed) : low.mul_(seed);
            }
        }
        if (any_A) {
            TORCH_CHECK(x.defined(), "adarank: x is needed for the gradient of lora_A");
            auto X = rows_of(x);
            auto to = As[0].scalar_type();
            for (auto &a : As)
                to = a.scalar_type() == to ? to : at::kFloat;
            std::vector<Tensor> dA;
            if (g.native) {
                dA = grad_a(dS, X, first, ranks, to, key, dropout);
            } else {
                if (is_mask(seed) && !dropped.defined())
                    dropped = at::mul(X, seed);
                auto all = at::mm(dS.t(), dropped.defined() ? dropped : X);
                all = all.scalar_type() == to ? all : all.to(to);
                for (size_t at = 0; at < through.size(); at++)
                    dA.push_back(width == ranks[at] ? all : all.narrow(0, first[at], ranks[at]));
            }
            for (size_t at = 0; at < through.size(); at++)
                if (wants(need_A, g.modules[through[at]]))
                    grads[1 + through[at]] = dA[at].scalar_type() == As[at].scalar_type() ? dA[at] : dA[at].to(As[at].scalar_type());
        }
    }
    if (dX.defined())
        grads[0] = dX.sizes() == x_shape ? dX : dX.view(x_shape);
    return grads;
}

std::vector<Tensor> tensors_of(const OptionalTensors &list)
{
    std::vector<Tensor> found(list.size());
    for (size_t i = 0; i < found.size(); i++)
        found[i] = list.get(i).value_or(Tensor());
    return found;
}

// The passes as operators. The first returns the outputs, S and A as it was packed.
std::vector<Tensor> group_forward(const Tensor &x, const OptionalTensors &parts, const OptionalTensors &bases,
                                  int64_t owned, at::ArrayRef<double> scalings, double dropout,
                                  const std::optional<Tensor> &seed, int64_t padding, bool add,
                                  const std::optional<Tensor> &given_S)
{
    Group g(Parts(parts), x, padding);
    auto passed = forward_pass(g, x, tensors_of(bases), owned, scalings, dropout, defined_or_empty(seed), add,
                               defined_or_empty(given_S));
    passed.Y.push_back(passed.S);
    passed.Y.push_back(passed.A);
    return passed.Y;
}

std::vector<Tensor> group_backward(const OptionalTensors &dys, const std::optional<Tensor> &x,
                                   const std::optional<Tensor> &S, const std::optional<Tensor> &packed,
                                   const OptionalTensors &parts, at::ArrayRef<double> scalings, double dropout,
                                   const std::optional<Tensor> &seed, int64_t padding,
                                   const std::optional<Tensor> &dropped, bool need_x, int64_t need_A, int64_t need_B,
                                   at::IntArrayRef x_shape, const std::optional<Tensor> &dS)
{
    at::AutoDispatchBelowADInplaceOrView guard;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    TORCH_CHECK(dys.size() < 64, "adarank: at most 63 modules in a group, got ", dys.size());
    auto dY = tensors_of(dys);
    auto like = std::find_if(dY.begin(), dY.end(), [](const Tensor &dy) { return dy.defined(); });
    if (like == dY.end())
        return {};
    Group g(Parts(parts), *like, padding);
    return backward_pass(g, std::move(dY), defined_or_empty(x), defined_or_empty(S), defined_or_empty(packed), {}, scalings,
                         dropout, defined_or_empty(seed), defined_or_empty(dropped), need_x, need_A, need_B, x_shape,
                         defined_or_empty(dS));
}

// A group that is called again and again: everything of a call but x. What it was made for is compared in every
// call, so that a parameter whose `.data` got another shape, or a device, is not met by the old layout. Parameters
// are not kept alive: they may hold hooks, and those the model.
struct Plan {
    static constexpr int64_t ALIGNED = 8; // columns of 16 bits that a vendor's GEMM reads fast

    struct Known {
        c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl> tensor;
        c10::DimVector sizes;
        at::ScalarType dtype;
        size_t position;
    };

    std::vector<Known> known;
    std::vector<double> scalings;
    double dropout;
    Layout wide, tight; // where the caller adds the low-rank products, and where a pass does
    at::ScalarType dtype;
    c10::Device device;
    int64_t out = 0; // columns of the outputs of modules with an adapter

    Plan(const Tensor &like, const OptionalTensors &parts, at::ArrayRef<double> scalings, double dropout, int64_t padding)
        : scalings(scalings.vec()), dropout(dropout), wide(Parts(parts), like, padding),
          tight(Parts(parts), like, ALIGNED), dtype(like.scalar_type()), device(like.device())
    {
        TORCH_CHECK(scalings.size() * 4 == parts.size() && scalings.size() < 64,
                    "adarank: one scaling for each module, of at most 63");
        dropped_below(dropout); // checks it
        for (size_t i = 0; i < parts.size(); i++)
            if (auto t = parts.get(i)) {
                known.push_back({decltype(Known::tensor)(t->getIntrusivePtr()), c10::DimVector(t->sizes()),
                                 t->scalar_type(), i});
                out += i % 4 == 3 ? t->size(0) : 0;
            }
    }

    // The parameters, if all is what it was made for.
    bool take(const Tensor &x, Parts &parts) const
    {
        if (x.scalar_type() != dtype || x.device() != device || x.dim() == 0)
            return false;
        std::vector<Tensor> *of[] = {&parts.weight, &parts.bias, &parts.A, &parts.B};
        for (auto &k : known) {
            Tensor t(k.tensor.lock());
            if (!t.defined() || t.sizes() != at::IntArrayRef(k.sizes) || t.scalar_type() != k.dtype ||
                t.device() != device || (k.position % 4 == 0 && t.requires_grad()))
                return false;
            (*of[k.position % 4])[k.position / 4] = std::move(t);
        }
        return true;
    }
};

// Plans by number: an operator's argument of a class costs Python tens of microseconds.
struct Plans {
    std::shared_mutex mutex;
    std::unordered_map<int64_t, std::shared_ptr<const Plan>> all;
    int64_t last = 0;

    int64_t add(std::shared_ptr<const Plan> plan)
    {
        std::unique_lock lock(mutex);
        all[++last] = std::move(plan);
        return last;
    }

    void remove(int64_t number)
    {
        std::unique_lock lock(mutex);
        all.erase(number);
    }

    std::shared_ptr<const Plan> get(int64_t number)
    {
        std::shared_lock lock(mutex);
        auto found = all.find(number);
        TORCH_CHECK(found != all.end(), "adarank: there is no group ", number);
        return found->second;
    }
};

Plans &plans()
{
    static auto *kept = new Plans(); // never destroyed: threads may outlive the library's statics
    return *kept;
}

int64_t make_group(const Tensor &like, const OptionalTensors &parts, at::ArrayRef<double> scalings, double dropout,
                   int64_t padding)
{
    return plans().add(std::make_shared<const Plan>(like, parts, scalings, dropout, padding));
}

void free_group(int64_t number) { plans().remove(number); }

namespace autograd = torch::autograd;
using autograd::SavedVariable;
using autograd::variable_list;

// What an Edge points with: it differs between releases of torch.
using NodePointer = decltype(autograd::Edge::function);

template <typename N, typename Pointer = NodePointer>
auto make_node()
{
    if constexpr (std::is_same_v<Pointer, std::shared_ptr<autograd::Node>>)
        return std::shared_ptr<N>(new N(), [](N *node) { deleteNode(node); });
    else
        return c10::make_intrusive<N>();
}

// Gradients that refuse to be differentiated, for create_graph.
variable_list once(variable_list grads)
{
    variable_list defined;
    for (auto &grad : grads)
        if (grad.defined()) {
            grad = grad.detach();
            grad.set_requires_grad(true);
            defined.push_back(grad);
        }
    auto refuse = std::make_shared<autograd::DelayedError>(
        "a fused LoRA layer cannot be differentiated twice; adarank_fast.restore gives plain PEFT back", defined.size());
    auto refusing = (*refuse)(std::move(defined));
    size_t next = 0;
    for (auto &grad : grads)
        if (grad.defined())
            grad = refusing[next++];
    return grads;
}

struct GroupLinearBackward : autograd::Node {
    std::shared_ptr<const Plan> plan;
    SavedVariable x, S, packed, seed; // x as it met A: with a mask, under it
    std::vector<SavedVariable> weight, A, B, low_B; // the last where it is not B
    std::vector<int64_t> trained, foreign;          // the modules with a trained bias, with a foreign base product
    std::vector<at::ScalarType> of_bias;
    c10::DimVector shape;
    bool tight;

    std::string name() const override { return "GroupLinearBackward"; }

    void release_variables() override
    {
        std::lock_guard<std::mutex> lock(mutex_);
        for (auto *saved : {&x, &S, &packed, &seed})
            saved->reset_data();
        for (auto *all : {&weight, &A, &B, &low_B})
            for (auto &saved : *all)
                saved.reset_data();
    }

    variable_list apply(variable_list &&dYs) override
    {
        std::lock_guard<std::mutex> lock(mutex_);
        auto &layout = tight ? plan->tight : plan->wide;
        auto &modules = layout.modules;
        size_t M = A.size(), count = modules.size();
        variable_list grads(1 + 2 * count), of_biases(trained.size());
        size_t some = 0;
        while (some < M && !dYs[some].defined())
            some++;
        if (some < M) {
            bool need_x = task_should_compute_output(0);
            int64_t need_A = 0, need_B = 0;
            for (size_t i = 0; i < count; i++) {
                need_A |= (int64_t)task_should_compute_output(1 + i) << modules[i];
                need_B |= (int64_t)task_should_compute_output(1 + count + i) << modules[i];
            }
            Parts parts(M);
            std::vector<Tensor> low;
            for (size_t m = 0; m < M; m++) {
                if (!weight.empty())
                    parts.weight[m] = weight[m].unpack();
                parts.A[m] = A[m].unpack(), parts.B[m] = B[m].unpack();
            }
            for (auto &saved : low_B)
                low.push_back(saved.unpack());
            for (size_t i = 0; i < low.size(); i++)
                if (!low[i].defined())
                    low[i] = parts.B[modules[i]];
            // Before the guards: hooks for saved tensors may compute a forward again.
            auto of_x = x.unpack(), of_S = S.unpack(), of_packed = packed.unpack(), of_seed = seed.unpack();
            at::AutoDispatchBelowADInplaceOrView guard;
            c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
            Group g(std::move(parts), layout);
            for (size_t i = 0; i < trained.size(); i++)
                if (dYs[trained[i]].defined() && task_should_compute_output(1 + 2 * count + i))
                    of_biases[i] = rows_of(dYs[trained[i]]).sum(0).to(of_bias[i]);
            auto dY = foreign.empty() ? std::move(dYs) : dYs;
            grads = backward_pass(g, std::move(dY), of_x, of_S, of_packed, low, plan->scalings, plan->dropout, of_seed,
                                  is_mask(of_seed) ? of_x : Tensor(), need_x, need_A, need_B, shape, Tensor());
            grads.resize(1 + 2 * count); // without what only a seed on a GPU needs
        }
        grads.insert(grads.end(), of_biases.begin(), of_biases.end());
        if (at::GradMode::is_enabled())
            grads = once(std::move(grads));
        for (auto m : foreign)
            grads.push_back(dYs[m]);
        return grads;
    }
};

// Dropout's seed on a CPU, or the mask: what `draw` in lora/dropout.py draws.
Tensor draw(const Plan &plan, const Tensor &x)
{
    at::AutoDispatchBelowADInplaceOrView guard;
    if (plan.wide.native)
        return at::randint(0, std::numeric_limits<int64_t>::max(), {1}, x.options().dtype(at::kLong));
    int64_t K = x.size(-1);
    return at::empty({K ? x.numel() / K : 0, K}, x.options())
        .bernoulli_((65536 - dropped_below(plan.dropout)) / 65536.0);
}

// The outputs of all modules; beyond `bound` numbers on a GPU then S, for the caller to add the low-rank products.
// Nothing where the plan does not fit the call. Bit m of `owned`: the class of module m's base layer lets nobody else
// hold its output.
std::vector<Tensor> group_linear(const Tensor &x, int64_t number, const std::optional<Tensor> &seed,
                                 const OptionalTensors &bases, int64_t owned, int64_t bound)
{
    auto plan = plans().get(number);
    Parts parts(plan->scalings.size());
    if (!plan->take(x, parts) || at::tracer::impl::is_dispatch_enabled() ||
        at::autocast::is_autocast_enabled(x.device().type()) ||
        c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode))
        return {};
    auto foreign = tensors_of(bases);
    TORCH_CHECK(foreign.empty() || foreign.size() == parts.A.size(), "adarank: one base product for each module");
    for (size_t m = 0; m < foreign.size(); m++)
        if (auto &base = foreign[m]; base.defined()) {
            if (base.scalar_type() != plan->dtype)
                return {};
            if (!base.is_contiguous() || base.is_view() || (base.is_leaf() && base.requires_grad()))
                owned &= ~((int64_t)1 << m);
        }
    int64_t K = x.size(-1), N = K ? x.numel() / K : 0;
    bool tight = plan->wide.native || N * plan->out <= bound;
    Group g(std::move(parts), tight ? plan->tight : plan->wide);
    auto noise = defined_or_empty(seed);
    if (!noise.defined() && plan->dropout > 0 && !g.modules.empty()) {
        if (!tight)
            return {}; // of many a mask takes too much memory
        noise = draw(*plan, x);
    }
    auto passed = forward_pass(g, x, foreign, owned, plan->scalings, plan->dropout, noise, tight, Tensor());
    for (size_t m = 0; m < foreign.size(); m++)
        if (foreign[m].defined() && wants(owned, m))
            foreign[m].unsafeGetTensorImpl()->bump_version();
    bool wanted = false;
    if (at::GradMode::is_enabled()) {
        wanted = x.requires_grad();
        for (auto m : g.modules)
            wanted = wanted || g.A[m].requires_grad() || g.B[m].requires_grad();
        for (auto &bias : g.bias)
            wanted = wanted || (bias.defined() && bias.requires_grad());
        for (auto &base : foreign)
            wanted = wanted || (base.defined() && base.requires_grad());
    }
    if (wanted) {
        size_t M = g.weight.size(), count = g.modules.size();
        auto node = make_node<GroupLinearBackward>();
        autograd::edge_list edges;
        edges.reserve(1 + 2 * count + foreign.size());
        edges.push_back(autograd::impl::gradient_edge(x));
        bool need_x = edges[0].is_valid(), need_A = false, need_B = false;
        for (auto m : g.modules)
            edges.push_back(autograd::impl::gradient_edge(g.A[m])), need_A |= edges.back().is_valid();
        for (auto m : g.modules)
            edges.push_back(autograd::impl::gradient_edge(g.B[m])), need_B |= edges.back().is_valid();
        for (size_t m = 0; m < M; m++)
            if (g.bias[m].defined() && g.bias[m].requires_grad() && (foreign.empty() || !foreign[m].defined())) {
                node->trained.push_back(m), node->of_bias.push_back(g.bias[m].scalar_type());
                edges.push_back(autograd::impl::gradient_edge(g.bias[m]));
            }
        for (size_t m = 0; m < foreign.size(); m++)
            if (foreign[m].defined())
                node->foreign.push_back(m), edges.push_back(autograd::impl::gradient_edge(foreign[m]));
        node->set_next_edges(std::move(edges));
        node->plan = plan, node->tight = tight, node->shape = x.sizes();
        if (need_A)
            node->x = SavedVariable(passed.dropped.defined() ? passed.dropped : x, false);
        if (need_B)
            node->S = SavedVariable(passed.S, false);
        if (need_x && passed.A.defined() && !passed.A.is_same(g.A[g.modules[0]]))
            node->packed = SavedVariable(passed.A, false);
        if (noise.defined())
            node->seed = SavedVariable(noise, false);
        node->A.reserve(M), node->B.reserve(M), node->weight.reserve(need_x ? M : 0), node->low_B.reserve(count);
        for (size_t m = 0; m < M; m++) {
            if (need_x)
                node->weight.emplace_back(g.weight[m], false);
            node->A.emplace_back(g.A[m], false), node->B.emplace_back(g.B[m], false);
        }
        bool cast = false;
        for (size_t i = 0; i < passed.B.size(); i++)
            cast = cast || !passed.B[i].is_same(g.B[g.modules[i]]);
        for (size_t i = 0; cast && i < passed.B.size(); i++)
            node->low_B.emplace_back(passed.B[i].is_same(g.B[g.modules[i]]) ? Tensor() : passed.B[i], false);
        for (size_t m = 0; m < M; m++) {
            auto &Y = passed.Y[m];
            if (m < foreign.size() && foreign[m].defined() && wants(owned, m))
                autograd::impl::rebase_history(Y, {node, node->add_input_metadata(Y)});
            else
                autograd::set_history(Y, node);
        }
    }
    if (!tight)
        passed.Y.push_back(passed.S);
    return passed.Y;
}
