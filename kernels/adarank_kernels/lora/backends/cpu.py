"""The products with few ranks by the C++ operators of `runtime/cpp`, for float32 and bfloat16.

A vendor's GEMM takes up to four times their arithmetic. The operators say what they mutate and have
fake kernels, so that compiled graphs call them too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from adarank_kernels.lora.backends import torch as aten
from adarank_kernels.runtime import native

DTYPES = (torch.float32, torch.bfloat16)

_lock = threading.Lock()
_usable: dict[torch.dtype, bool] = {}


def _is_usable(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for it; builds the operators if need be."""
    if not _usable:
        with _lock:  # fakes can be registered once only
            if not _usable:
                operators = native.operators()
                if operators is not None:
                    _register_fakes()
                _usable.update({d: operators is not None and operators.knows(d) for d in DTYPES})
    return _usable.get(dtype, False)


def usable(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the operators take x, and factors of these dtypes beside it."""
    if x.device.type != "cpu" or not _is_usable(x.dtype):
        return False
    return all(t is None or t.dtype in (x.dtype, torch.float32) for t in others)


def _register_fakes() -> None:
    fake = torch.library.register_fake

    @fake("adarank::drop")
    def _(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
        return x.new_empty(x.shape)

    @fake("adarank::shrink")
    def _(
        x: Tensor,
        lora_A: Sequence[Tensor],
        first: Sequence[int],
        width: int,
        seed: Tensor | None,
        dropout: float,
    ) -> Tensor:
        return x.new_empty(x.shape[0], width)

    for name in ("expand_", "grad_s_", "grad_x_"):
        fake(f"adarank::{name}")(lambda *arguments: None)

    @fake("adarank::grad_b")
    def _(
        dy: Tensor, s: Tensor, first: int, rank: int, scaling: float, dtype: torch.dtype
    ) -> Tensor:
        return dy.new_empty(dy.shape[1], rank, dtype=dtype)

    @fake("adarank::grad_a")
    def _(
        ds: Tensor,
        x: Tensor,
        first: Sequence[int],
        ranks: Sequence[int],
        dtype: torch.dtype,
        seed: Tensor | None,
        dropout: float,
    ) -> list[Tensor]:
        return [x.new_empty(rank, x.shape[1], dtype=dtype) for rank in ranks]


def padded(rank: int, dtype: torch.dtype) -> int:
    """bfloat16's ranks are multiplied two by two; a column of zeros follows an odd one."""
    return rank + rank % 2 if dtype == torch.bfloat16 else rank


def drop(X: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    return X if seed is None else torch.ops.adarank.drop(X, seed, dropout)


def shrink(
    X: Tensor,
    As: Sequence[Tensor],
    first: Sequence[int],
    width: int,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    return torch.ops.adarank.shrink(X, As, first, width, seed, dropout), None


def expand(
    Ys: Sequence[Tensor],
    S: Tensor,
    Bs: Sequence[Tensor],
    first: Sequence[int],
    scalings: Sequence[float],
    in_place: bool,
) -> list[Tensor]:
    if any([Y.dtype != S.dtype for Y in Ys]):  # a foreign base's own
        return aten.expand(Ys, S, Bs, first, scalings, in_place)
    outputs = list(Ys) if in_place else [Y.clone() for Y in Ys]
    for Y, B, start, scaling in zip(outputs, Bs, first, scalings, strict=True):
        torch.ops.adarank.expand_(Y, S, B, start, scaling, None)
    return outputs


def grad_S(
    dYs: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    first: Sequence[int],
    width: int,
) -> Tensor:
    dS = dYs[0].new_empty(dYs[0].shape[0], width)
    for dY, B, scaling, start in zip(dYs, Bs, scalings, first, strict=True):
        torch.ops.adarank.grad_s_(dS, dY, B, start, scaling)
    return dS


def grad_B(
    dY: Tensor, S: Tensor, start: int, rank: int, scaling: float, dtype: torch.dtype
) -> Tensor:
    return torch.ops.adarank.grad_b(dY, S, start, rank, scaling, dtype)


def grad_X(
    dX: Tensor | None,
    dS: Tensor,
    As: Sequence[Tensor],
    first: Sequence[int],
    packed: Tensor | None,
    seed: Tensor | None,
    dropout: float,
) -> Tensor:
    dX = dS.new_zeros(dS.shape[0], As[0].shape[1]) if dX is None else dX
    torch.ops.adarank.grad_x_(dX, dS, As, first, seed, dropout)
    return dX


def grad_A(
    dS: Tensor,
    X: Tensor,
    As: Sequence[Tensor],
    first: Sequence[int],
    seed: Tensor | None,
    dropout: float,
) -> list[Tensor]:
    dtypes = {A.dtype for A in As}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    ranks = [A.shape[0] for A in As]
    found = torch.ops.adarank.grad_a(dS, X, first, ranks, dtype, seed, dropout)
    return [dA if dA.dtype == A.dtype else dA.to(A.dtype) for dA, A in zip(found, As, strict=True)]
