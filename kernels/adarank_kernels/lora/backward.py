"""The backward pass of a group of LoRA linears: what the base needs, then one of three low ranks.

With few ranks on the CPU the products are `_skinny`'s; on a GPU Triton kernels run beside the
vendor's; everything else, and what a compiler traces, is plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adarank_kernels.lora import skinny as _skinny
from adarank_kernels.lora.dropout import keep_mask, threshold
from adarank_kernels.lora.parts import (
    Spec,
    alone,
    cast,
    drop,
    pack,
    rows,
    scaled,
    side_by_side,
    straight,
)
from adarank_kernels.runtime.registry import HAS_TRITON

if HAS_TRITON:
    from adarank_kernels.lora import triton_launch as launch

Found = list[Tensor | None]  # a gradient for each module


class _LowRank(NamedTuple):
    """What the low-rank terms' gradients are made of."""

    spec: Spec
    X: Tensor | None  # [N, in]; None if no A needs its gradient
    S: Tensor | None  # [N, sum r]; None if no B does
    seed: Tensor | None
    packed: Tensor | None  # A as the forward pass packed it, if it kept it
    lora_As: Sequence[Tensor]
    lora_Bs: Sequence[Tensor]
    dYs: dict[int, Tensor]  # [N, out_m] of the adapted modules whose outputs were used
    through: Sequence[int]  # those of them whose dS is needed
    columns: Sequence[int]  # where their dS starts; then its width
    need_x: bool
    need_A: Sequence[bool]
    need_B: Sequence[bool]


def backward(ctx: Any, dYs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of all that the forward pass got, in its order."""
    spec: Spec = ctx.spec
    M = len(spec.ranks)
    x, S, seed, packed, *saved = ctx.saved_tensors
    need_x, _, *needs = ctx.needs_input_grad[1:]
    need_W, need_bias, need_A, need_B, need_base = (needs[i * M : i * M + M] for i in range(5))
    X = None if x is None else straight(rows(x), spec)
    dW: Found = [None] * M
    dbias, dbase = dW[:], dW[:]
    dX: Tensor | None = None
    low: dict[int, Tensor] = {}
    for m, dY in enumerate(dYs):
        if dY is None:
            continue
        dY2 = rows(dY)
        if need_base[m]:
            dbase[m] = dY
        if need_W[m]:
            dW[m] = torch.mm(dY2.t(), X)  # type: ignore[arg-type]
        if need_bias[m]:
            dbias[m] = dY2.sum(0)
        weight = saved[m]
        if need_x and weight is not None:
            dX = torch.mm(dY2, weight) if dX is None else dX.addmm_(dY2, weight)
        if spec.ranks[m]:
            low[m] = straight(cast(dY2, ctx.dtype), spec)
    dA: Found = [None] * M
    dB = dA[:]
    if low:
        through = [m for m in low if need_x or need_A[m]]
        same = len(through) == len(spec.adapted) and not spec.ones
        columns = spec.columns if same else spec.starts(through)
        given = _LowRank(
            spec, X, S, seed, packed, saved[M : 2 * M], saved[2 * M :], low, through, columns,
            need_x, need_A, need_B,
        )  # fmt: skip
        if spec.native:
            dX = _native(given, dX, dA, dB)
        elif spec.kernels:
            dX = _launched(given, dX, dA, dB)
        else:
            dX = _plain(given, dX, dA, dB)
    if dX is not None:
        dX = dX.view(ctx.x_shape)
    return (None, dX, None, *dW, *dbias, *dA, *dB, *dbase)


def _plain(g: _LowRank, dX: Tensor | None, dA: Found, dB: Found) -> Tensor | None:
    """Products of torch's."""
    spec = g.spec
    for m, dY in g.dYs.items():
        if g.need_B[m]:
            assert g.S is not None
            S_m = g.S.narrow(1, spec.first[m], spec.ranks[m])
            dB[m] = _dB(S_m, dY, spec.scalings[m], spec.B_dtypes[m])  # type: ignore[arg-type]
    if not g.through:
        return dX
    like = g.dYs[g.through[0]]
    new = like.new_zeros if torch.compiler.is_compiling() else like.new_empty
    dS = new(like.shape[0], g.columns[-1])
    for m, start in zip(g.through, g.columns, strict=False):
        B = scaled(g.lora_Bs[m], m, spec, like.dtype)
        if spec.folded and B.dtype == torch.float32:
            B = B.t().contiguous().t()  # MKL is slower and less exact along rows of B
        part = dS.narrow(1, start, spec.ranks[m])
        part.addmm_(g.dYs[m], B, beta=0.0, alpha=spec.alpha(m))
    if g.need_x:
        dX = _add_dX(g, dX, dS, pack(g.lora_As, g.through, g.columns, spec, like.dtype))
    _dA(g, dS, dA)
    return dX


def _launched(g: _LowRank, dX: Tensor | None, dA: Found, dB: Found) -> Tensor | None:
    """On a GPU: as few launches as there can be, and little between them."""
    spec, S = g.spec, g.S
    dS = None
    if g.through:
        like = g.dYs[g.through[0]]
        # the padding, which nobody writes, meets A's
        padded = g.columns[-1] > sum([spec.ranks[m] for m in g.through])
        dS = (like.new_zeros if padded else like.new_empty)(like.shape[0], g.columns[-1])
        for m, start in zip(g.through, g.columns, strict=False):
            part, B = dS.narrow(1, start, spec.ranks[m]), cast(g.lora_Bs[m], like.dtype)
            part.addmm_(g.dYs[m], B, beta=0.0, alpha=spec.scalings[m])
    for m, dY in g.dYs.items():
        if g.need_B[m]:  # factors and transposes cost a GEMM nothing here
            S_m = S.narrow(1, spec.first[m], spec.ranks[m])  # type: ignore[union-attr]
            new = dY.new_empty(dY.shape[1], spec.ranks[m])
            new.addmm_(dY.t(), S_m, beta=0.0, alpha=spec.scalings[m])
            dB[m] = cast(new, spec.B_dtypes[m])
    if dS is None:
        return dX
    if g.need_x:
        A = g.packed
        if A is None or len(g.through) < len(spec.adapted):
            A = pack(g.lora_As, g.through, g.columns, spec, dS.dtype)
        dX = _add_dX(g, dX, dS, A)
    _dA(g, dS, dA)
    return dX


def _add_dX(g: _LowRank, dX: Tensor | None, dS: Tensor, A: Tensor) -> Tensor:
    """dX + drop(dS A), in place where there is a dX."""
    if g.seed is None:
        return torch.mm(dS, A) if dX is None else dX.addmm_(dS, A)
    low = torch.mm(dS, A)
    if "lora_drop" in g.spec.kernels:
        return launch.drop(low, g.seed, g.spec.dropout, dX)
    low.mul_(keep_mask(g.seed, low.shape[0], low.shape[1], g.spec.dropout))
    return low if dX is None else dX.add_(low)


def _dA(g: _LowRank, dS: Tensor, dA: Found) -> None:
    """dS^T drop(X), one product for the group."""
    if not any([g.need_A[m] for m in g.through]):
        return
    assert g.X is not None
    stacked = torch.mm(dS.t(), drop(g.X, g.seed, g.spec))
    for m, start in zip(g.through, g.columns, strict=False):
        if g.need_A[m]:
            dA[m] = cast(stacked.narrow(0, start, g.spec.ranks[m]), g.spec.A_dtypes[m])


def _native(g: _LowRank, dX: Tensor | None, dA: Found, dB: Found) -> Tensor | None:
    """Products of `_skinny`, whose segments have even widths."""
    spec = g.spec
    dS = None
    if g.through:
        like = g.dYs[g.through[0]]
        dS = like.new_empty(like.shape[0], g.columns[-1])
        for m, start in zip(g.through, g.columns, strict=False):
            part = dS.narrow(1, start, spec.ranks[m] + spec.ranks[m] % 2)
            _skinny.narrow(g.dYs[m], part, alone(g.lora_Bs[m]), spec.scalings[m])
    for m, dY in g.dYs.items():
        if g.need_B[m]:
            S_m = g.S.narrow(1, spec.first[m], spec.ranks[m] + spec.ranks[m] % 2)  # type: ignore[union-attr]
            new = dY.new_empty(dY.shape[1], spec.ranks[m], dtype=spec.B_dtypes[m])
            _skinny.outer(dY, S_m, alone(new), spec.scalings[m])
            dB[m] = new
    if dS is None:
        return dX
    if g.need_x:
        As = side_by_side(g.lora_As, g.through, g.columns)
        if g.seed is not None or dX is None:
            low = dS.new_zeros(dS.shape[0], g.lora_As[g.through[0]].shape[1])
            _skinny.wide(low, dS, As)
            if g.seed is None:
                dX = low
            else:
                out = low if dX is None else dX
                dX = _skinny.drop(low, g.seed, threshold(spec.dropout), out, dX is not None)
        else:
            _skinny.wide(dX, dS, As)
    if any([g.need_A[m] for m in g.through]):
        assert g.X is not None
        found = {m: g.X.new_empty(spec.ranks[m], g.X.shape[1], dtype=spec.A_dtypes[m])
                 for m in g.through}  # fmt: skip
        factors = side_by_side(found, g.through, g.columns)
        _skinny.outer(drop(g.X, g.seed, spec), dS, factors)
        for m in g.through:
            dA[m] = found[m] if g.need_A[m] else None
    return dX


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
