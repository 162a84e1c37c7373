"""The products with few ranks by the C++ operators of `runtime/cpp`, for float32 and bfloat16.

A vendor's GEMM takes up to four times their arithmetic. The operators say what they mutate and have
fake kernels, so that compiled graphs call them too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from adarank_kernels.lora.backends import Dtypes, Integers, Numbers, Seed, Tensors
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
    fakes: dict[str, Callable[..., object]] = {
        "drop": lambda x, seed, dropout: x.new_empty(x.shape),
        "shrink": lambda x, As, first, width, seed, dropout: x.new_empty(x.shape[0], width),
        "grad_b": lambda dy, s, first, rank, scaling, dtype: dy.new_empty(
            dy.shape[1], rank, dtype=dtype
        ),
        "grad_a": lambda ds, x, first, ranks, dtype, seed, dropout: [
            x.new_empty(rank, x.shape[1], dtype=dtype) for rank in ranks
        ],
    }
    for name in ("expand_", "grad_s_", "grad_x_"):
        fakes[name] = lambda *arguments: None
    for name, fake in fakes.items():
        torch.library.register_fake(f"adarank::{name}")(fake)


def padded(rank: int, dtype: torch.dtype) -> int:
    """bfloat16's ranks are multiplied two by two; a column of zeros follows an odd one."""
    return rank + rank % 2 if dtype == torch.bfloat16 else rank


def drop(X: Tensor, seed: Seed, dropout: float) -> Tensor:
    return X if seed is None else torch.ops.adarank.drop(X, seed, dropout)


def shrink(
    X: Tensor, As: Tensors, first: Integers, width: int, seed: Seed, dropout: float
) -> tuple[Tensor, Tensor | None]:
    return torch.ops.adarank.shrink(X, As, first, width, seed, dropout), None


def expand(
    Ys: Tensors, S: Tensor, Bs: Tensors, first: Integers, scalings: Numbers, in_place: bool
) -> list[Tensor]:
    if any([Y.dtype != S.dtype for Y in Ys]):  # a foreign base's own
        return aten.expand(Ys, S, Bs, first, scalings, in_place)
    outputs = list(Ys) if in_place else [Y.clone() for Y in Ys]
    for Y, B, start, scaling in zip(outputs, Bs, first, scalings, strict=True):
        torch.ops.adarank.expand_(Y, S, B, start, scaling, None)
    return outputs


def grad_S(dYs: Tensors, Bs: Tensors, scalings: Numbers, first: Integers, width: int) -> Tensor:
    dS = dYs[0].new_empty(dYs[0].shape[0], width)
    for dY, B, scaling, start in zip(dYs, Bs, scalings, first, strict=True):
        torch.ops.adarank.grad_s_(dS, dY, B, start, scaling)
    return dS


def grad_B(
    dYs: Tensors, S: Tensor, first: Integers, ranks: Integers, scalings: Numbers, dtypes: Dtypes
) -> list[Tensor]:
    each = zip(dYs, first, ranks, scalings, dtypes, strict=True)
    return [torch.ops.adarank.grad_b(dY, S, *of) for dY, *of in each]


def grad_X(
    dX: Tensor | None,
    dS: Tensor,
    As: Tensors,
    first: Integers,
    packed: Tensor | None,
    seed: Seed,
    dropout: float,
) -> Tensor:
    dX = dS.new_zeros(dS.shape[0], As[0].shape[1]) if dX is None else dX
    torch.ops.adarank.grad_x_(dX, dS, As, first, seed, dropout)
    return dX


def grad_A(
    dS: Tensor, X: Tensor, As: Tensors, first: Integers, seed: Seed, dropout: float
) -> list[Tensor]:
    dtypes = {A.dtype for A in As}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    ranks = [A.shape[0] for A in As]
    found = torch.ops.adarank.grad_a(dS, X, first, ranks, dtype, seed, dropout)
    return [dA if dA.dtype == A.dtype else dA.to(A.dtype) for dA, A in zip(found, As, strict=True)]
