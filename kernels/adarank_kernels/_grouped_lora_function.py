"""The autograd node of grouped_lora.py, where its maths is written down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adarank_kernels import _skinny
from adarank_kernels._dropout import keep_mask, threshold
from adarank_kernels._skinny import Factors
from adarank_kernels._triton import HAS_TRITON, INTERPRETED, ready_among

if HAS_TRITON:
    from adarank_kernels import _grouped_lora_launch as launch

# As in F.linear: a reader could not change an output in place (relu_, +=) if it were a view.
_unsafe_view = torch.ops.aten._unsafe_view.default
_CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}


class Spec(NamedTuple):
    """What is not a tensor: constant from step to step."""

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]  # 1 / (1 - dropout) folded in
    dropout: float
    adapted: tuple[int, ...]  # the modules with a rank above 0
    A_dtypes: tuple[torch.dtype | None, ...]
    B_dtypes: tuple[torch.dtype | None, ...]
    folded: bool  # on the CPU: scalings on B; the biases of `biased` join the low-rank product
    biased: tuple[int, ...]
    kernels: frozenset[str]  # the Triton kernels that passed their check on this device
    native: bool = False  # on the CPU: products with few ranks by _skinny
    columns: tuple[int, ...] = ()  # `starts` of the adapted modules in S; see `placed`
    first: tuple[int, ...] = ()  # of each module its first column in S; 0 if it has none

    def placed(self, **changes: Any) -> Spec:
        """With these changes, and the columns that go with them."""
        spec = self._replace(**changes)
        columns = tuple(spec.starts(spec.adapted, spec.ones))
        first = dict(zip(spec.adapted, columns, strict=False))
        return spec._replace(
            columns=columns, first=tuple(first.get(m, 0) for m in range(len(spec.ranks)))
        )

    @property
    def ones(self) -> tuple[int, ...]:
        """Modules whose segment of S ends with a column of ones, which meets their bias."""
        return () if self.native else self.biased

    def starts(self, modules: Sequence[int], ones: Sequence[int] = ()) -> list[int]:
        """First columns of these modules' segments, packed side by side; then the total width."""
        starts = [0]
        for m in modules:
            rank = self.ranks[m] + int(m in ones)
            if self.kernels:
                rank = launch.padded(rank)
            elif self.native:
                rank += rank % 2
            starts.append(starts[-1] + rank)
        return starts

    def alpha(self, m: int) -> float:
        """The factor of a product with B_m or dY_m."""
        return 1.0 if self.folded else self.scalings[m]


_ANY_WIDTH = ("lora_expand", "lora_down", "lora_drop")
_KERNELS = (*_ANY_WIDTH, "lora_shrink", "lora_fused")


def ready_kernels(x: Tensor) -> frozenset[str]:
    """The Triton kernels that may run on this input."""
    if not INTERPRETED and (x.device.type != "cuda" or torch.compiler.is_compiling()):
        return _NO_KERNELS
    names = _KERNELS if launch.rows_aligned(x) else _ANY_WIDTH
    return ready_among(names, x.device, x.dtype)


_NO_KERNELS: frozenset[str] = frozenset()


def _rows(tensor: Tensor) -> Tensor:
    """[..., features] -> [N, features], a view wherever one exists."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _pack(
    lora_As: Sequence[Tensor | None],
    modules: Sequence[int],
    starts: Sequence[int],
    spec: Spec,
    dtype: torch.dtype,
) -> Tensor:
    """Stack [r, in] to [R, in] in the compute dtype; a lone A of that dtype is not copied.

    Rows beyond a module's rank repeat others: their columns of S are not read, of dS zero.
    """
    pieces: list[Tensor] = []
    for i, m in enumerate(modules):
        A: Tensor = lora_As[m]  # type: ignore[assignment]
        more = starts[i + 1] - starts[i] - A.shape[0]
        pieces.append(A)
        if more:
            pieces.append(A[:more] if more <= len(A) else A[:1].expand(more, -1))
    packed = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return _cast(packed, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # the call costs a microsecond


def _scaled(B: Tensor, m: int, spec: Spec, dtype: torch.dtype) -> Tensor:
    """B_m in the compute dtype, times s_m where folded."""
    if spec.folded and spec.scalings[m] != 1.0:
        B = B * spec.scalings[m]
    return _cast(B, dtype)


def _drop(X: Tensor, seed: Tensor | None, spec: Spec) -> Tensor:
    """X with its dropped elements at zero; their scale is in spec.scalings."""
    if seed is None:
        return X
    if "lora_drop" in spec.kernels:
        return launch.drop(X, seed, spec.dropout)
    if spec.native:
        return _skinny.drop(X, seed, threshold(spec.dropout), torch.empty_like(X))
    return X * keep_mask(seed, X.shape[0], X.shape[1], spec.dropout)


def _add_dropped(total: Tensor | None, X: Tensor, seed: Tensor, spec: Spec) -> Tensor:
    """total + drop(X), in place where there is a total."""
    if "lora_drop" in spec.kernels:
        return launch.drop(X, seed, spec.dropout, total)
    if spec.native:
        add, out = total is not None, X if total is None else total
        return _skinny.drop(X, seed, threshold(spec.dropout), out, add)
    X = X.mul_(keep_mask(seed, X.shape[0], X.shape[1], spec.dropout))
    return X if total is None else total.add_(X)


def _shrink(
    X: Tensor, lora_As: Sequence[Tensor | None], seed: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor | None]:
    """S = drop(X) A^T; and A as it was packed for a kernel, which the backward pass can use again.

    Not on the CPU, where packing takes no launch and memory is short.
    """
    if spec.native:
        S = X.new_empty(X.shape[0], spec.columns[-1])
        factors = _side_by_side(lora_As, spec.adapted, spec.columns)
        _skinny.narrow(_drop(X, seed, spec), S, factors)
        return S, None
    A = _pack(lora_As, spec.adapted, spec.columns, spec, X.dtype)
    kept = A if spec.kernels else None
    if (
        seed is not None and "lora_shrink" in spec.kernels
    ):  # without dropout the vendor's is as fast
        return launch.shrink(X, A, seed, spec.dropout), kept
    return torch.mm(_drop(X, seed, spec), A.t()), kept


def _expand(base: Tensor, S: Tensor, B: Tensor, alpha: float) -> Tensor:
    """base += alpha S B^T, in place; cast where a foreign base has a dtype of its own."""
    if base.dtype == S.dtype:
        return base.addmm_(S, B.t(), alpha=alpha)
    return base.add_(torch.mm(S, B.t()), alpha=alpha)


def _side_by_side(
    lora_As: Sequence[Tensor | None], modules: Sequence[int], starts: Sequence[int]
) -> Factors:
    """A of these modules, or its gradients, by the columns of S."""
    return Factors([lora_As[m] for m in modules], [0] * len(modules), list(starts[:-1]))  # type: ignore[misc]


def _alone(B: Tensor) -> Factors:
    """B of one module, or its gradient, by the columns of its segment of S."""
    return Factors((B,), (1,), (0,))


def _straight(rows: Tensor, spec: Spec) -> Tensor:
    """Rows as _skinny reads them, their elements side by side; as they are for everyone else."""
    if not spec.native or (rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]):
        return rows
    return rows.contiguous()


def _may_overwrite(base: Tensor) -> bool:
    """Whether `base` can be added into: rows in order, no view, no leaf that wants its gradient."""
    if torch.compiler.is_compiling():
        return False
    leaf = base.is_leaf and base.requires_grad
    return base.is_contiguous() and not base._is_view() and not leaf


class GroupedLoraLinear(torch.autograd.Function):
    """Tensors, M of each: weights, biases, lora_As, lora_Bs, base_outputs (None: absent)."""

    @staticmethod
    def forward(
        ctx: Any, spec: Spec, x: Tensor, seed: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        M = len(spec.ranks)
        weights, biases, lora_As, lora_Bs, bases = (tensors[i * M : i * M + M] for i in range(5))
        X = _straight(_rows(x), spec)
        first = spec.first
        S = packed = None
        if spec.adapted:
            S, packed = _shrink(X, lora_As, seed, spec)
            for m in spec.ones:
                S.select(1, first[m] + spec.ranks[m]).fill_(1.0)
        compiling = torch.compiler.is_compiling()
        in_order = (spec.folded or bool(spec.kernels)) and x.is_contiguous()
        outputs: list[Tensor] = []
        dirty: list[Tensor] = []
        later: list[tuple[Tensor, int, Tensor, float]] = []  # for one launch of expand
        for m, base in enumerate(bases):
            B = lora_Bs[m] if spec.ranks[m] else None
            bias, weight = biases[m], weights[m]
            if m in spec.biased:
                bias = None
            Y = None  # the output, if it has its shape already
            if base is not None:
                if B is not None and _may_overwrite(base):
                    dirty.append(base)
                    Y, Y2 = base, _rows(base)
                else:
                    Y2 = _rows(base).clone(**_CONTIGUOUS)
            elif B is not None and "lora_fused" in spec.kernels:
                Y2 = launch.fused(X, weight, bias, S[:, first[m] :], B, spec.scalings[m])  # type: ignore
                B = None
            elif in_order and (bias is None or spec.kernels):  # no view on the way out
                Y = Y2 = F.linear(x, weight, bias)  # type: ignore[arg-type]
                if not spec.kernels and x.dim() != 2:
                    Y2 = Y.view(-1, Y.shape[-1])
            else:
                Y2 = F.linear(X, weight, bias)  # type: ignore[arg-type]
            if S is not None and B is not None:
                if spec.native:
                    S_m = S.narrow(1, first[m], B.shape[1] + B.shape[1] % 2)
                    late = biases[m] if m in spec.biased else None
                    _skinny.wide(Y2, S_m, _alone(B), spec.scalings[m], late)
                elif "lora_expand" in spec.kernels and Y2.dtype == S.dtype:
                    later.append((Y2, first[m], B, spec.scalings[m]))
                else:
                    B = _scaled(B, m, spec, S.dtype)
                    if m in spec.ones:
                        B = torch.cat([B, biases[m].unsqueeze(1)], 1)  # type: ignore[union-attr]
                    _expand(Y2, S.narrow(1, first[m], B.shape[1]), B, spec.alpha(m))
            if Y is None and x.dim() == 2 and not compiling:
                Y = Y2
            elif Y is None:  # torch.compile of torch 2.11 loses the gradient of what addmm_ changed
                Y = _unsafe_view(Y2, [*x.shape[:-1], Y2.shape[-1]])
            outputs.append(Y)
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
            packed if need_x else None,
            *(weights if need_x else absent),
            *(lora_As if need_x else absent),
            *(lora_Bs if need_x or any(need_A) else absent),
        )
        ctx.spec, ctx.x_shape, ctx.dtype = spec, x.shape, x.dtype
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
    spec: Spec = ctx.spec
    M = len(spec.ranks)
    x, S, seed, packed, *saved = ctx.saved_tensors
    weights, lora_As, lora_Bs = saved[:M], saved[M : 2 * M], saved[2 * M :]
    need_x, _, *needs = ctx.needs_input_grad[1:]
    need_W, need_bias, need_A, need_B, need_base = (needs[i * M : i * M + M] for i in range(5))
    none: list[Tensor | None] = [None] * M
    dW, dbias, dA, dB, dbase = none[:], none[:], none[:], none[:], none[:]
    dX: Tensor | None = None
    X = None if x is None else _straight(_rows(x), spec)
    S_starts = spec.first
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
    low_rank = [m for m in spec.adapted if m in flat and (need_x or need_A[m])]
    same = len(low_rank) == len(spec.adapted) and not spec.ones
    dS_starts = spec.columns if same else spec.starts(low_rank)
    low = {m: _straight(_cast(flat[m], ctx.dtype), spec) for m in spec.adapted if m in flat}
    dS = None
    if low_rank:
        dS = _new_dS(low[low_rank[0]], dS_starts[-1], sum(spec.ranks[m] for m in low_rank), spec)
        done: list[int] = []
        if "lora_down" in spec.kernels:
            done = [m for m in low_rank if need_B[m] and spec.ranks[m] <= launch.DOWN_MAX_RANK]
        if done:
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
                dB[m] = dB_m.to(spec.B_dtypes[m])
        for m, start in zip(low_rank, dS_starts, strict=False):
            if m not in done:
                if spec.native:
                    part = dS.narrow(1, start, spec.ranks[m] + spec.ranks[m] % 2)
                    _skinny.narrow(low[m], part, _alone(lora_Bs[m]), spec.scalings[m])
                    continue
                B = _scaled(lora_Bs[m], m, spec, ctx.dtype)
                if spec.folded and B.dtype == torch.float32:
                    B = B.t().contiguous().t()  # MKL is slower and less exact along rows of B
                part = dS.narrow(1, start, spec.ranks[m])
                part.addmm_(low[m], B, beta=0.0, alpha=spec.alpha(m))
    for m, dY2 in low.items():
        if need_B[m] and dB[m] is None:
            if spec.native:
                S_m = S.narrow(1, S_starts[m], spec.ranks[m] + spec.ranks[m] % 2)
                dB[m] = dY2.new_empty(dY2.shape[1], spec.ranks[m], dtype=spec.B_dtypes[m])
                _skinny.outer(dY2, S_m, _alone(dB[m]), spec.scalings[m])  # type: ignore[arg-type]
                continue
            S_m = S.narrow(1, S_starts[m], spec.ranks[m])
            dB_of = _dB_on_gpu if spec.kernels else _dB
            dB[m] = dB_of(S_m, dY2, spec.scalings[m], spec.B_dtypes[m])  # type: ignore[arg-type]

    if dS is not None and need_x and spec.native:
        As = _side_by_side(lora_As, low_rank, dS_starts)
        if seed is not None or dX is None:
            through = dS.new_zeros(dS.shape[0], ctx.x_shape[-1])
            _skinny.wide(through, dS, As)
            dX = through if seed is None else _add_dropped(dX, through, seed, spec)
        else:
            _skinny.wide(dX, dS, As)
    elif dS is not None and need_x:
        A = packed
        if A is None or len(low_rank) < len(spec.adapted):
            A = _pack(lora_As, low_rank, dS_starts, spec, ctx.dtype)
        if seed is not None:
            dX = _add_dropped(dX, torch.mm(dS, A), seed, spec)
        else:
            dX = torch.mm(dS, A) if dX is None else dX.addmm_(dS, A)
    if dS is not None and any(need_A[m] for m in low_rank):
        assert X is not None
        dropped = _drop(X, seed, spec)
        if spec.native:
            found = [X.new_empty(0)] * M
            for m in low_rank:
                found[m] = X.new_empty(spec.ranks[m], X.shape[1], dtype=spec.A_dtypes[m])
            _skinny.outer(dropped, dS, _side_by_side(found, low_rank, dS_starts))
        else:
            stacked = torch.mm(dS.t(), dropped)
            found = [stacked] * M
            for m, start in zip(low_rank, dS_starts, strict=False):
                found[m] = _cast(stacked.narrow(0, start, spec.ranks[m]), spec.A_dtypes[m])
        for m in low_rank:
            dA[m] = found[m] if need_A[m] else None
    if dX is not None:
        dX = dX.view(ctx.x_shape)
    return (None, dX, None, *dW, *dbias, *dA, *dB, *dbase)


def _new_dS(like: Tensor, width: int, written: int, spec: Spec) -> Tensor:
    """[N, width]; zeros where padding, or a compiler, would otherwise read what nobody wrote."""
    padding = spec.kernels and written < width
    fill = like.new_zeros if padding or torch.compiler.is_compiling() else like.new_empty
    return fill(like.shape[0], width)


def _dB_on_gpu(S: Tensor, dY: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling dY^T S, rounded once: one launch, as factors and transposes cost a GEMM nothing."""
    dB = dY.new_empty(dY.shape[1], S.shape[1])
    return _cast(dB.addmm_(dY.t(), S, beta=0.0, alpha=scaling), dtype)


def _dB(S: Tensor, dY: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling dY^T S, rounded once; transposed and cast in one pass into the parameter's layout."""
    # A power of two may come after the rounding, where the range is float32's.
    exact = math.frexp(scaling)[0] == 0.5 and dY.dtype != torch.float16
    if exact:
        dBt = torch.mm(S.t(), dY)
    else:
        new = dY.new_zeros if torch.compiler.is_compiling() else dY.new_empty
        dBt = new(S.shape[1], dY.shape[1]).addmm_(S.t(), dY, beta=0.0, alpha=scaling)
    dB = torch.empty(dBt.shape[::-1], dtype=dtype, device=dBt.device)
    if exact and scaling != 1.0:
        return torch.mul(dBt.t(), scaling, out=dB)
    return dB.copy_(dBt.t())
