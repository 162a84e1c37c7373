"""The products with few ranks on a GPU: checked Triton kernels beside vendor GEMMs.

Ranks take a multiple of 16 columns of S, which tensor cores and the kernels like. Factors and
transposes cost a GEMM nothing here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adarank_kernels.lora import triton_gradients_launch as gradients
from adarank_kernels.lora import triton_launch as launch
from adarank_kernels.lora.backends import Dtypes, Integers, Numbers, Seed, Tensors
from adarank_kernels.lora.backends import torch as aten
from adarank_kernels.lora.backends.torch import cast, pack
from adarank_kernels.lora.dropout import is_mask
from adarank_kernels.runtime.registry import ready_among

ANY_WIDTH = ("lora_expand", "lora_drop")
KERNELS = (*ANY_WIDTH, "lora_shrink")
BACKWARD = ("lora_grad_s", "lora_grad_b", "lora_grad_a")


def padded(rank: int, dtype: torch.dtype) -> int:
    return launch.padded(rank)


def kernels(x: Tensor) -> frozenset[str]:
    """Those that may run on rows like x's."""
    names = KERNELS if launch.rows_aligned(x) else ANY_WIDTH
    return ready_among(names, x.device, x.dtype)


def backward_kernels(x: Tensor) -> frozenset[str]:
    """Those of the backward pass that may run on tensors like x."""
    return ready_among(BACKWARD, x.device, x.dtype)


def drop(X: Tensor, seed: Seed, dropout: float) -> Tensor:
    if seed is None or is_mask(seed) or "lora_drop" not in kernels(X):
        return aten.drop(X, seed, dropout)
    return launch.drop(X, seed, dropout)


def shrink(
    X: Tensor, As: Tensors, first: Integers, width: int, seed: Seed, dropout: float
) -> tuple[Tensor, Tensor | None]:
    A = pack(As, first, width, X.dtype)
    if seed is not None and not is_mask(seed) and "lora_shrink" in kernels(X):
        return launch.shrink(X, A, seed, dropout), A  # without dropout the vendor's is as fast
    return torch.mm(drop(X, seed, dropout), A.t()), A


def expand(
    Ys: Tensors, S: Tensor, Bs: Tensors, first: Integers, scalings: Numbers, in_place: bool
) -> list[Tensor]:
    if not in_place or "lora_expand" not in kernels(S):
        return aten.expand(Ys, S, Bs, first, scalings, in_place)
    if any([Y.dtype != S.dtype or not Y.is_contiguous() for Y in Ys]):
        return aten.expand(Ys, S, Bs, first, scalings, in_place)
    launch.expand(Ys, S, first, Bs, scalings)
    return list(Ys)


def grad_S(dYs: Tensors, Bs: Tensors, scalings: Numbers, first: Integers, width: int) -> Tensor:
    like, dtype = dYs[0], dYs[0].dtype
    if "lora_grad_s" in backward_kernels(like) and gradients.fits(dYs):
        return gradients.grad_s(dYs, Bs, scalings, first, width)
    gaps = width > sum([B.shape[1] for B in Bs])  # nobody writes them, and they meet A's padding
    dS = (like.new_zeros if gaps else like.new_empty)(like.shape[0], width)
    for dY, B, scaling, start in zip(dYs, Bs, scalings, first, strict=True):
        dS.narrow(1, start, B.shape[1]).addmm_(dY, cast(B, dtype), beta=0.0, alpha=scaling)
    return dS


def grad_B(
    dYs: Tensors, S: Tensor, first: Integers, ranks: Integers, scalings: Numbers, dtypes: Dtypes
) -> list[Tensor]:
    if "lora_grad_b" not in backward_kernels(S) or not gradients.fits(dYs):
        return aten.grad_B(dYs, S, first, ranks, scalings, dtypes)
    found = gradients.grad_b(dYs, S, first, ranks, scalings, common(dtypes))
    return [cast(dB, dtype) for dB, dtype in zip(found, dtypes, strict=True)]


def grad_X(
    dX: Tensor | None,
    dS: Tensor,
    As: Tensors,
    first: Integers,
    packed: Tensor | None,
    seed: Seed,
    dropout: float,
) -> Tensor:
    A = pack(As, first, dS.shape[1], dS.dtype) if packed is None else packed
    if seed is None:
        return torch.mm(dS, A) if dX is None else dX.addmm_(dS, A)
    return drop_into(torch.mm(dS, A), seed, dropout, dX)


def drop_into(low: Tensor, seed: Tensor, dropout: float, dX: Tensor | None) -> Tensor:
    """Add drop(low) to dX, in place."""
    if not is_mask(seed) and "lora_drop" in kernels(low):
        return launch.drop(low, seed, dropout, dX)
    low = aten.drop(low, seed, dropout)
    return low if dX is None else dX.add_(low)


def grad_A(
    dS: Tensor, X: Tensor, As: Tensors, first: Integers, seed: Seed, dropout: float
) -> list[Tensor]:
    usable = "lora_grad_a" in backward_kernels(X) and gradients.fits([X])
    if seed is None or is_mask(seed) or not usable:
        return aten.grad_A(dS, drop(X, seed, dropout), As, first, None, 0.0)
    dtype = common([A.dtype for A in As])
    return aten.apart(gradients.grad_a(dS, X, seed, dropout, dtype), As, first)


def common(dtypes: Dtypes) -> torch.dtype:
    """The dtype of all, or float32."""
    return dtypes[0] if len({*dtypes}) == 1 else torch.float32
