"""M linears that share an input, each with a low-rank term of its own rank, as one autograd node.

    S     = drop(X) A^T                     one shrink: A = [A_1; ...; A_M] packed, S [N, sum r]
    Y_m   = X W_m^T + b_m + s_m S_m B_m^T   added in place into the base product

    dS_m  = s_m dY_m B_m                    into one packed [N, sum r]
    dX    = sum_m dY_m W_m + drop(dS A)     one buffer
    dA    = dS^T drop(X)                    one product for the group
    dB_m  = s_m (S_m^T dY_m)^T

Saved for backward: X, S and the parameters. drop is made again from its seed (_dropout.py); its
scale 1 / (1 - p) rides on s_m. Products accumulate in float32 (float64 for float64).

The forms of the skinny products were chosen by measurement on the CPU: dB as (S^T dY)^T takes a
third to two thirds of dY^T S, dA as dS^T X a third to three quarters of (X^T dS)^T; S and dS are
row-major (column-major costs up to 2x in the expand); accumulating dX with `addmm_` beats a product
and an addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adarank_kernels._dropout import draw_seed, keep_mask, keep_scale
from adarank_kernels._triton import HAS_TRITON, INTERPRETED, ready

if HAS_TRITON:
    from adarank_kernels import _grouped_lora_launch as launch

# As in F.linear: a reader could not change an output in place (relu_, +=) if it were a view.
_unsafe_view = torch.ops.aten._unsafe_view.default
_CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}


class _Spec(NamedTuple):
    """What is not a tensor: constant from step to step."""

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]  # 1 / (1 - dropout) folded in
    dropout: float
    kernels: frozenset[str]  # the Triton kernels that passed their check on this device

    def starts(self, modules: Sequence[int]) -> list[int]:
        """First columns of these modules' segments, packed side by side; then the total width."""
        starts = [0]
        for m in modules:
            rank = self.ranks[m]
            starts.append(starts[-1] + (launch.padded(rank) if self.kernels else rank))
        return starts


_ANY_WIDTH = ("expand", "down", "drop")
_KERNELS = (*_ANY_WIDTH, "shrink", "fused")


def _ready_kernels(x: Tensor) -> frozenset[str]:
    if not INTERPRETED and (x.device.type != "cuda" or torch.compiler.is_compiling()):
        return frozenset()
    names = _KERNELS if launch.rows_aligned(_rows(x)) else _ANY_WIDTH
    return frozenset(name for name in names if ready(f"lora_{name}", x.device, x.dtype))


def _rows(tensor: Tensor) -> Tensor:
    """[..., features] -> [N, features], a view wherever one exists."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _pack(lora_As: Sequence[Tensor], starts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Stack [r, in] to [R, in] in the compute dtype; a lone A of that dtype is not copied."""
    pieces: list[Tensor] = []
    for A, start, end in zip(lora_As, starts, starts[1:], strict=False):
        pieces.append(A)
        if end - start > A.shape[0]:
            pieces.append(A.new_zeros(()).expand(end - start - A.shape[0], A.shape[1]))
    packed = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return packed.to(dtype)


def _drop(X: Tensor, seed: Tensor | None, spec: _Spec) -> Tensor:
    """X with its dropped elements at zero; their scale is in spec.scalings."""
    if seed is None:
        return X
    if "drop" in spec.kernels:
        return launch.drop(X, seed, spec.dropout)
    return X * keep_mask(seed, X.shape[0], X.shape[1], spec.dropout)


def _add_dropped(total: Tensor | None, X: Tensor, seed: Tensor, spec: _Spec) -> Tensor:
    """total + drop(X), in place where there is a total."""
    if "drop" in spec.kernels:
        return launch.drop(X, seed, spec.dropout, total)
    X = X.mul_(keep_mask(seed, X.shape[0], X.shape[1], spec.dropout))
    return X if total is None else total.add_(X)


def _shrink(X: Tensor, A: Tensor, seed: Tensor | None, spec: _Spec) -> Tensor:
    """S = drop(X) A^T."""
    if "shrink" in spec.kernels:
        return launch.shrink(X, A, seed, spec.dropout)
    return torch.mm(_drop(X, seed, spec), A.t())


def _expand(base: Tensor, S: Tensor, B: Tensor, scaling: float) -> Tensor:
    """base += scaling S B^T, in place; cast where a foreign base has a dtype of its own."""
    B = B.to(S.dtype)
    if base.dtype == S.dtype:
        return base.addmm_(S, B.t(), alpha=scaling)
    return base.add_(torch.mm(S, B.t()), alpha=scaling)


def _may_overwrite(base: Tensor) -> bool:
    """Whether `base` can be added into: rows in order, no view, no leaf that wants its gradient."""
    if torch.compiler.is_compiling():
        return False
    leaf = base.is_leaf and base.requires_grad
    return base.is_contiguous() and not base._is_view() and not leaf


class _GroupedLoraLinear(torch.autograd.Function):
    """Tensors, M of each: weights, biases, lora_As, lora_Bs, base_outputs (None: absent)."""

    @staticmethod
    def forward(
        ctx: Any, spec: _Spec, x: Tensor, seed: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        M = len(spec.ranks)
        weights, biases, lora_As, lora_Bs, bases = (tensors[i * M : i * M + M] for i in range(5))
        X = _rows(x)
        adapted = [m for m in range(M) if spec.ranks[m]]
        starts = spec.starts(adapted)
        S = None
        if adapted:
            A = _pack([lora_As[m] for m in adapted], starts, x.dtype)  # type: ignore[misc]
            S = _shrink(X, A, seed, spec)
        outputs: list[Tensor] = []
        dirty: list[Tensor] = []
        later: list[tuple[Tensor, int, Tensor, float]] = []  # for one launch of expand
        for m, base in enumerate(bases):
            weight, B, scaling = weights[m], lora_Bs[m], spec.scalings[m]
            start = starts[adapted.index(m)] if spec.ranks[m] else 0
            overwrite = base is not None and spec.ranks[m] > 0 and _may_overwrite(base)
            if base is not None:
                Y = _rows(base) if overwrite else _rows(base).clone(**_CONTIGUOUS)
            elif S is not None and B is not None and spec.ranks[m] and "fused" in spec.kernels:
                Y = launch.fused(X, weight, biases[m], S[:, start:], B, scaling)  # type: ignore[arg-type]
                B = None
            else:
                Y = F.linear(X, weight, biases[m])  # type: ignore[arg-type]
            if S is not None and B is not None and spec.ranks[m]:
                if "expand" in spec.kernels and Y.dtype == S.dtype:
                    later.append((Y, start, B, scaling))
                else:
                    _expand(Y, S[:, start : start + spec.ranks[m]], B, scaling)
            if overwrite:
                assert base is not None
                dirty.append(base)
                outputs.append(base)
            else:
                outputs.append(Y if x.dim() == 2 else _unsafe_view(Y, [*x.shape[:-1], Y.shape[-1]]))
        if later:
            assert S is not None
            products, offsets, Bs, scalings = zip(*later, strict=True)
            launch.expand(products, S, offsets, Bs, scalings)
        if dirty:
            ctx.mark_dirty(*dirty)

        need_x, _, *needs = ctx.needs_input_grad[1:]
        need_W, _, need_A, need_B, _ = (needs[i * M : i * M + M] for i in range(5))
        absent = (None,) * M
        ctx.save_for_backward(
            x if any(need_W) or any(need_A) else None,
            S if any(need_B) else None,
            seed,
            *(weights if need_x else absent),
            *(lora_As if need_x else absent),
            *(lora_Bs if need_x or any(need_A) else absent),
        )
        ctx.spec, ctx.x_shape, ctx.dtype = spec, x.shape, x.dtype
        ctx.A_dtypes = [None if A is None else A.dtype for A in lora_As]
        ctx.B_dtypes = [None if B is None else B.dtype for B in lora_Bs]
        ctx.device_type = x.device.type
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(ctx.device_type):
            return _backward(ctx, dYs)
        with torch.autocast(ctx.device_type, enabled=False):  # the forward's dtypes hold
            return _backward(ctx, dYs)


def _backward(ctx: Any, dYs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    spec: _Spec = ctx.spec
    M = len(spec.ranks)
    x, S, seed, *saved = ctx.saved_tensors
    weights, lora_As, lora_Bs = saved[:M], saved[M : 2 * M], saved[2 * M :]
    need_x, _, *needs = ctx.needs_input_grad[1:]
    need_W, need_bias, need_A, need_B, need_base = (needs[i * M : i * M + M] for i in range(5))
    none: list[Tensor | None] = [None] * M
    dW, dbias, dA, dB, dbase = none[:], none[:], none[:], none[:], none[:]
    dX: Tensor | None = None
    X = None if x is None else _rows(x)
    adapted = [m for m in range(M) if spec.ranks[m]]
    S_starts = dict(zip(adapted, spec.starts(adapted), strict=False))
    flat: dict[int, Tensor] = {}  # of the outputs that were used

    for m, dY in enumerate(dYs):
        if dY is None:
            continue
        flat[m] = dY2 = _rows(dY)
        if need_base[m]:
            dbase[m] = dY
        if need_W[m]:
            dW[m] = torch.mm(dY2.t(), X)  # type: ignore[arg-type]
        if need_bias[m]:
            dbias[m] = dY2.sum(0)
        if need_x and weights[m] is not None:
            dX = torch.mm(dY2, weights[m]) if dX is None else dX.addmm_(dY2, weights[m])

    # The low-rank part: dS of the modules that need it, side by side, and dB on the way.
    low_rank = [m for m in adapted if m in flat and (need_x or need_A[m])]
    dS_starts = spec.starts(low_rank)
    low = {m: flat[m].to(ctx.dtype) for m in adapted if m in flat}
    dS = None
    if low_rank:
        dS = _new_dS(low[low_rank[0]], dS_starts[-1], spec)
        done: list[int] = []
        if "down" in spec.kernels:
            done = [m for m in low_rank if need_B[m] and spec.ranks[m] <= launch.DOWN_MAX_RANK]
            found = launch.down(
                [low[m] for m in done],
                S,
                [S_starts[m] for m in done],
                [lora_Bs[m] for m in done],
                [spec.scalings[m] for m in done],
                dS,
                [dS_starts[low_rank.index(m)] for m in done],
            )
            for m, dB_m in zip(done, found, strict=True):
                dB[m] = dB_m.to(ctx.B_dtypes[m])
        for m, start in zip(low_rank, dS_starts, strict=False):
            if m not in done:
                part = dS[:, start : start + spec.ranks[m]]
                part.addmm_(low[m], lora_Bs[m].to(ctx.dtype), beta=0.0, alpha=spec.scalings[m])
    for m, dY2 in low.items():
        if need_B[m] and dB[m] is None:
            S_m = S[:, S_starts[m] : S_starts[m] + spec.ranks[m]]
            dB[m] = _dB(S_m, dY2, spec.scalings[m], ctx.B_dtypes[m])

    if dS is not None and need_x:
        A = _pack([lora_As[m] for m in low_rank], dS_starts, ctx.dtype)
        if seed is not None:
            dX = _add_dropped(dX, torch.mm(dS, A), seed, spec)
        else:
            dX = torch.mm(dS, A) if dX is None else dX.addmm_(dS, A)
    if dS is not None and any(need_A[m] for m in low_rank):
        assert X is not None
        packed = torch.mm(dS.t(), _drop(X, seed, spec))
        for m, start in zip(low_rank, dS_starts, strict=False):
            if need_A[m]:
                dA[m] = packed[start : start + spec.ranks[m]].to(ctx.A_dtypes[m])
    if dX is not None:
        dX = dX.view(ctx.x_shape)
    return (None, dX, None, *dW, *dbias, *dA, *dB, *dbase)


def _new_dS(like: Tensor, width: int, spec: _Spec) -> Tensor:
    """[N, width]; zeros where padding, or a compiler, would otherwise read what nobody wrote."""
    fill = like.new_zeros if spec.kernels or torch.compiler.is_compiling() else like.new_empty
    return fill(like.shape[0], width)


def _scaled_mm(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling left right, rounded once."""
    new = left.new_zeros if torch.compiler.is_compiling() else left.new_empty
    return new(left.shape[0], right.shape[1]).addmm_(left, right, beta=0.0, alpha=scaling)


def _dB(S: Tensor, dY: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling dY^T S, transposed and cast in one pass into the parameter's own layout."""
    dBt = _scaled_mm(S.t(), dY, scaling)
    return torch.empty(dBt.shape[::-1], dtype=dtype, device=dBt.device).copy_(dBt.t())


def grouped_lora_linear(
    x: Tensor,
    weights: Sequence[Tensor | None] | None,
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scalings: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    base_outputs: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """M linears of one input, each with a low-rank term: x W_m^T + b_m + s_m drop(x) A_m^T B_m^T.

    Ranks and widths may all differ. One autograd node for the group, which keeps x and the packed
    [N, sum r] product for backward, and does no work for gradients that nobody needs.

    Args:
        x: [..., in], any strides; N rows in all, none included.
        weights: M of [out_m, in], in x's dtype, any strides (a transposed view is not copied).
            None, or a None in the list, where `base_outputs` has the product.
        lora_As: M of [r_m, in], any floating dtype; None: no adapter.
        lora_Bs: M of [out_m, r_m], likewise; cast to x's dtype, gradients in their own.
        scalings: M numbers s_m.
        biases: M of [out_m] or None.
        dropout: probability of dropping an element of x on the low-rank path; one mask a group.
        seed: int64 tensor with one element on x's device that fixes the mask; None: drawn from
            torch's generator of that device.
        base_outputs: M base products [..., out_m] made elsewhere (a quantised base, say), or None
            for those to be computed here. **Consumed**: written into where autograd allows it. The
            part of the gradient of x that runs through them flows by their own graph.

    Returns:
        M outputs [..., out_m].

    Raises:
        ValueError: shapes that do not fit, tensors on several devices, dropout outside [0, 1].
        TypeError: integer inputs, weights that are not of x's dtype.
    """
    M = len(lora_As)
    weights = [None] * M if weights is None else list(weights)
    biases = [None] * M if biases is None else list(biases)
    bases = [None] * M if base_outputs is None else list(base_outputs)
    _check_lengths(
        M, weights=weights, lora_Bs=lora_Bs, scalings=scalings, biases=biases, base_outputs=bases
    )
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    if M == 0:
        return []
    device_type = x.device.type
    autocast = torch.is_autocast_enabled(device_type) and x.dtype != torch.float64
    if autocast:  # as torch's linear does: everything to the autocast dtype, x once for the group
        dtype = torch.get_autocast_dtype(device_type)
        x = x.to(dtype)
        weights = [None if w is None else w.to(dtype) for w in weights]
        biases = [None if b is None else b.to(dtype) for b in biases]
    for m in range(M):
        _check_module(m, x, weights[m], lora_As[m], lora_Bs[m], biases[m], bases[m])
    scale = keep_scale(dropout)
    spec = _Spec(
        tuple(0 if A is None else A.shape[0] for A in lora_As),
        tuple(float(s) * scale for s in scalings),
        float(dropout),
        _ready_kernels(x),
    )
    if dropout == 0.0 or not any(spec.ranks):
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    tensors = (*weights, *biases, *lora_As, *lora_Bs, *bases)
    if autocast:
        with torch.autocast(device_type, enabled=False):
            return list(_GroupedLoraLinear.apply(spec, x, seed, *tensors))
    return list(_GroupedLoraLinear.apply(spec, x, seed, *tensors))


def _check_lengths(M: int, **lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if len(values) != M:
            raise ValueError(f"{name} must have one entry per module ({M}), got {len(values)}")


def _check_module(
    m: int,
    x: Tensor,
    weight: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
) -> None:
    """Raise where module m does not fit x, naming the argument."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    width = x.shape[-1] if x.dim() else -1
    if base is not None:
        out = base.shape[-1] if base.dim() else -1
        if base.shape[:-1] != x.shape[:-1] or not base.is_floating_point():
            raise ValueError(
                f"base_outputs[{m}] must be floating point [*{list(x.shape[:-1])}, out], "
                f"got {base.dtype} {list(base.shape)}"
            )
    elif weight is None:
        raise ValueError(f"module {m} has neither weights[{m}] nor base_outputs[{m}]")
    else:
        if weight.dtype != x.dtype:
            raise TypeError(f"weights[{m}] must have x's dtype {x.dtype}, got {weight.dtype}")
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(f"weights[{m}] must be [out, {width}], got {list(weight.shape)}")
        out = weight.shape[0]
        if bias is not None and tuple(bias.shape) != (out,):
            raise ValueError(f"biases[{m}] must be [{out}], got {list(bias.shape)}")
    if (A is None) != (B is None):
        raise ValueError(f"lora_As[{m}] and lora_Bs[{m}] must both be given or both be None")
    if A is not None and B is not None:
        if A.dim() != 2 or A.shape[1] != width:
            raise ValueError(f"lora_As[{m}] must be [rank, {width}], got {list(A.shape)}")
        if tuple(B.shape) != (out, A.shape[0]):
            raise ValueError(f"lora_Bs[{m}] must be [{out}, {A.shape[0]}], got {list(B.shape)}")
        if not (A.is_floating_point() and B.is_floating_point()):
            raise TypeError(f"lora_As[{m}] and lora_Bs[{m}] must be floating point, got {A.dtype}")
    for name, tensor in (("weights", weight), ("lora_As", A), ("lora_Bs", B), ("biases", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}[{m}] is on {tensor.device}, x on {x.device}")


def grouped_lora_linear_ref(
    x: Tensor,
    weights: Sequence[Tensor | None] | None,
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scalings: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    base_outputs: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """`grouped_lora_linear`, a module and an operation at a time, differentiated by torch."""
    dropped = x
    if dropout:
        seed = draw_seed(x.device) if seed is None else seed
        keep = keep_mask(seed, x.numel() // x.shape[-1], x.shape[-1], dropout).view(x.shape)
        dropped = x * keep * keep_scale(dropout)
    outputs = []
    for m, (A, B, scaling) in enumerate(zip(lora_As, lora_Bs, scalings, strict=True)):
        base = None if base_outputs is None else base_outputs[m]
        if base is None:
            assert weights is not None
            weight = weights[m]
            assert weight is not None
            base = F.linear(x, weight, None if biases is None else biases[m])
        if A is not None and B is not None:
            low_rank = F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype)) * scaling
            base = (base + low_rank).to(base.dtype)
        outputs.append(base)
    return outputs
