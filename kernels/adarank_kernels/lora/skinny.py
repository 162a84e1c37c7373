"""Products of a wide matrix with a few ranks on the CPU: `_skinny.c`, built on first use.

A vendor's GEMM takes up to twice their arithmetic, and in bfloat16 17 microseconds before it begins
(two cores, 2026): a LoRA step is made of dozens of them. The library shares torch's OpenMP threads;
without a C compiler, or in other element types, torch's products stand in.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from adarank_kernels.runtime import native as _native

LEAST_ROWS = 16  # fewer do not start the build


_DTYPES = {torch.float32: (), torch.bfloat16: ("-DBF16",)}


class Factors:
    """Low-rank matrices whose ranks lie side by side in the columns of S.

    Args:
        tensors: of S's dtype or float32, any strides.
        rank_dims: the dimension of each that counts the ranks.
        starts: first column of each in S, even; a column of zeros follows an odd rank.
    """

    __slots__ = ("array", "count", "tensors")

    def __init__(
        self, tensors: Sequence[Tensor], rank_dims: Sequence[int], starts: Sequence[int]
    ) -> None:
        numbers: list[int] = []
        for tensor, ranks, start in zip(tensors, rank_dims, starts, strict=True):
            strides = tensor.stride()
            numbers += (
                tensor.data_ptr(),
                strides[ranks],
                strides[1 - ranks],
                tensor.shape[ranks],
                start,
                tensor.dtype == torch.float32,
            )
        self.array = (ctypes.c_int64 * len(numbers))(*numbers)
        self.count = len(tensors)
        self.tensors = tensors  # alive as long as their addresses


def usable(x: Tensor) -> bool:
    """Whether products with rows like x's may be computed here: as they are, and natively."""
    if x.device.type != "cpu" or x.dtype not in _DTYPES or type(x) is not Tensor:
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    return rows >= LEAST_ROWS and _library(x.dtype) is not None


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    openmp = _torchs_openmp()
    if openmp is None or (dtype == torch.bfloat16 and not _has_bfloat16()):
        return None
    source = Path(__file__).with_suffix(".c").read_text()
    options = ("-fopenmp", *_DTYPES[dtype], "-Wl,--as-needed", openmp)
    loaded = _native.build("skinny", source, *options)
    if loaded is None:
        return None
    address, i64, scale, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    matrices = (address, i64, i64, i64, address, i64, i64, address, i64, scale)
    loaded.narrow.argtypes = loaded.outer.argtypes = (*matrices, i32)
    loaded.wide.argtypes = (*matrices, address, i32)
    mask = (ctypes.c_uint64, i32, address, i64, i32, i32)
    loaded.drop.argtypes, loaded.drop.restype = (address, i64, i64, i64, *mask), None
    return loaded


def _has_bfloat16() -> bool:
    """AVX512-BF16: elsewhere the library would have nothing to multiply bfloat16 with."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _torchs_openmp() -> str | None:
    """The OpenMP library in this process: with another, each would keep threads of its own."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # no Linux
        return None
    paths = {line.split()[-1] for line in maps.splitlines() if "/libgomp" in line}
    return min(paths, key=lambda path: "torch" not in path, default=None)


def narrow(X: Tensor, S: Tensor, factors: Factors, scaling: float = 1.0) -> None:
    """S = X (scaling F)^T; X [N, features], rows contiguous, as in all of these."""
    _call("narrow", X, S, factors, scaling)


def wide(
    X: Tensor, S: Tensor, factors: Factors, scaling: float = 1.0, bias: Tensor | None = None
) -> None:
    """X += S (scaling F) + bias."""
    _call("wide", X, S, factors, scaling, 0 if bias is None else bias.data_ptr())


def outer(X: Tensor, S: Tensor, factors: Factors, scaling: float = 1.0) -> None:
    """F = scaling S^T X, rounded once, in F's own dtypes."""
    _call("outer", X, S, factors, scaling)


def drop(X: Tensor, seed: Tensor, dropped: int, out: Tensor, add: bool = False) -> Tensor:
    """out = X, or out += X, where the mask of `seed` keeps an element; rows contiguous.

    Args:
        dropped: as `_dropout.threshold` gives it; half words below it are dropped.
    """
    _library(X.dtype).drop(  # type: ignore[union-attr]
        X.data_ptr(),
        X.stride(0),
        X.shape[0],
        X.shape[1],
        int(seed) % 2**64,
        dropped,
        out.data_ptr(),
        out.stride(0),
        add,
        torch.get_num_threads(),
    )
    return out


def _call(name: str, X: Tensor, S: Tensor, factors: Factors, scaling: float, *more: int) -> None:
    failed = getattr(_library(X.dtype), name)(
        X.data_ptr(),
        X.stride(0),
        X.shape[0],
        X.shape[1],
        S.data_ptr(),
        S.stride(0),
        S.shape[1],
        factors.array,
        factors.count,
        scaling,
        *more,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for a product of {tuple(X.shape)} with {S.shape[1]} ranks")
