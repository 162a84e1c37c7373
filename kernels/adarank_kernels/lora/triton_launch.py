"""Launchers and numerical self-checks of the kernels in `triton_kernels.py`.

Every launcher takes matrices of one dtype on one device, in the packed layout described there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TypedDict

import torch
from torch import Tensor

from adarank_kernels.lora import dropout as _dropout
from adarank_kernels.lora import triton_kernels as kernels
from adarank_kernels.runtime.registry import cdiv, check_close, kind, launch, on_device, register

SLOTS = 4  # modules a launch


PADDING = 16  # the smallest K of a tensor-core product


# One known-good configuration each; BLOCK_R follows the rank, in these steps.
SHRINK = {"BLOCK_M": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}


SHRINK_BLOCKS_R = (16, 32, 64)


EXPAND = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_R": 16, "num_warps": 8, "num_stages": 2}
SMALLER = {"BLOCK_M": 64}  # of ragged rows on Blackwell, where the tile above would spill


DROP = {"BLOCK_M": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 1}


def padded(rank: int) -> int:
    """The width of a rank's segment in the packed layout."""
    return cdiv(rank, PADDING) * PADDING


def rows_aligned(x: Tensor) -> bool:
    """Whether the rows of x [..., in] start at 16 elements: else shrink would spill.

    Rows that are not in order are copied first.
    """
    if x.shape[-1] % 16:
        return False
    return x.is_contiguous() or x.stride(-1) != 1 or all(s % 16 == 0 for s in x.stride()[:-1])


def precision(dtype: torch.dtype) -> str:
    """PRECISION of a kernel's products."""
    return "ieee" if dtype == torch.float32 else "tf32"  # ignored for 16-bit operands


def _key(tensors: Sequence[Tensor], integers: Sequence[int]) -> tuple[object, ...]:
    """For `launch`."""
    pointers = [(t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
    return tensors[0].device, *pointers, *map(kind, integers)


def _rows_in_order(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def slots(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Four pointers, each at 16 bytes; unused slots repeat the first."""
    held = [t if t.is_contiguous() else t.contiguous() for t in tensors]
    held = [t if t.data_ptr() % 16 == 0 else t.clone() for t in held]
    return held + [held[0]] * (SLOTS - len(held))


def one_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """As they are if their dtypes agree (a launch has one pointer type), else all in `dtype`."""
    if len({t.dtype for t in tensors}) > 1:
        return [t.to(dtype) for t in tensors]
    return list(tensors)


def expand_tiles(
    offsets: Sequence[int], ranks: Sequence[int], outs: Sequence[int], block: int
) -> tuple[tuple[int, ...], ...]:
    """A row per column tile: module, S offset, rank, padded rank, first column, out."""
    return tuple(
        (m, offset, rank, padded(rank), first, out)
        for m, (offset, rank, out) in enumerate(zip(offsets, ranks, outs, strict=True))
        for first in range(0, out if rank else 0, block)
    )


@lru_cache(maxsize=4096)
def _expand_constants(
    offsets: Sequence[int],
    shapes: tuple[torch.Size, ...],
    scalings: Sequence[float],
    device: torch.device,
) -> tuple[Tensor, int, Tensor]:
    """`expand_tiles` on the device, how many there are, and the scalings, of B's shapes."""
    outs, ranks = zip(*shapes, strict=True)
    tiles = expand_tiles(offsets, ranks, outs, EXPAND["BLOCK_N"])
    table = torch.tensor([(*tile, 0, 0) for tile in tiles], dtype=torch.int32, device=device)
    return table, len(tiles), torch.tensor(scalings, dtype=torch.float32, device=device)


@cache
def _is_blackwell(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 10


def shrink(X: Tensor, A: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """drop(X) [N, in] A^T -> S [N, R], without the scale of the dropout."""
    X, A = _rows_in_order(X), A.contiguous()
    (N, K), R = X.shape, A.shape[0]
    S = X.new_empty(N, R)
    if not S.numel():
        return S
    block_r = next((block for block in SHRINK_BLOCKS_R if block >= R), SHRINK_BLOCKS_R[-1])
    grid = (cdiv(N, SHRINK["BLOCK_M"]), cdiv(R, block_r))
    tensors = (X, A, S, X if seed is None else seed)
    integers = (N, K, R, X.stride(0), _dropout.threshold(dropout))
    constants = SHRINK | {
        "BLOCK_R": block_r,
        "EVEN_K": K % SHRINK["BLOCK_K"] == 0,
        "DROPOUT": seed is not None,
        "PRECISION": precision(X.dtype),
    }
    with on_device(X.device):
        launch(kernels.shrink_kernel, _key(tensors, integers), grid, tensors + integers, constants)
    return S


def expand(
    products: Sequence[Tensor],
    S: Tensor,
    offsets: Sequence[int],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
) -> None:
    """products[m] [..., out_m] += scalings[m] S_m B_m^T, in place, four modules a launch.

    Products must be contiguous; `offsets` are the first columns of the modules in S.
    """
    N = S.shape[0]
    for i in range(0, len(products) if N else 0, SLOTS):
        some = slice(i, i + SLOTS)
        ys, Bs = list(products[some]), one_dtype(lora_Bs[some], S.dtype)
        if any(y.data_ptr() % 16 for y in ys):
            for y, offset, B, scaling in zip(ys, offsets[some], Bs, scalings[some], strict=True):
                S_m = S[:, offset : offset + B.shape[1]]
                y.view(N, -1).addmm_(S_m, B.to(S.dtype).t(), alpha=scaling)
            continue
        shapes = tuple([B.shape for B in Bs])
        table, tiles, factors = _expand_constants(
            tuple(offsets[some]), shapes, tuple(scalings[some]), S.device
        )
        aligned = all([out % 16 == 0 for out, _ in shapes])
        ys += [ys[0]] * (SLOTS - len(ys))
        arguments = (S, *ys, *slots(Bs), factors, table, N, S.stride(0))
        key = S.device, S.dtype, Bs[0].dtype, S.data_ptr() % 16 == 0, kind(N), kind(S.stride(0))
        options = EXPAND if aligned or not _is_blackwell(S.device) else EXPAND | SMALLER
        constants = options | {"ALIGNED": aligned, "PRECISION": precision(S.dtype)}
        grid = cdiv(N, options["BLOCK_M"]), tiles
        with on_device(S.device):
            launch(kernels.expand_kernel, key, grid, arguments, constants)


def drop(X: Tensor, seed: Tensor, dropout: float, out: Tensor | None = None) -> Tensor:
    """X [N, in] with its dropped elements at zero, unscaled; added to `out` if given."""
    X = _rows_in_order(X)
    N, K = X.shape
    add = out is not None
    result = X.new_empty(N, K) if out is None else out
    if X.numel():
        grid = (cdiv(N, DROP["BLOCK_M"]), cdiv(K, DROP["BLOCK_K"]))
        tensors = (X, result, seed)
        integers = (N, K, X.stride(0), _dropout.threshold(dropout))
        key, constants = _key(tensors, integers), DROP | {"ADD": add}
        with on_device(X.device):
            launch(kernels.drop_kernel, key, grid, tensors + integers, constants)
    return result


# Self-checks: small but ragged problems, mixed ranks, each 16-bit dtype, against float64.
_RANKS, _OUTS, _N, _K = (1, 3, 24, 16), (160, 72, 33, 256), 150, 200


class Problem(TypedDict):
    """Operands of a group of four modules."""

    X: Tensor
    A: Tensor
    S: Tensor
    Bs: list[Tensor]
    Ys: list[Tensor]
    offsets: list[int]
    scalings: list[float]
    seed: Tensor


def problem(
    device: torch.device, dtype: torch.dtype, rows: int = _N, outs: Sequence[int] = _OUTS
) -> Problem:
    """Random operands with these rows, and columns of Ys."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    offsets = [sum(padded(r) for r in _RANKS[:m]) for m in range(len(_RANKS))]
    total = sum(padded(r) for r in _RANKS)
    return {
        "X": randn(rows, _K),
        "A": randn(total, _K, scale=_K**-0.5),
        "S": randn(rows, total),
        "Bs": [randn(o, r, scale=r**-0.5) for o, r in zip(outs, _RANKS, strict=True)],
        "Ys": [randn(rows, o) for o in outs],
        "offsets": offsets,
        "scalings": [0.5, 2.0, 1.0, 1.5],
        "seed": torch.tensor([2**61 + 12345], device=device),
    }


def each_dtype(
    check: Callable[[Problem], None], make: Callable[..., Problem] = problem
) -> Callable[[torch.device], None]:
    """A check of both 16-bit dtypes."""

    def run(device: torch.device) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            check(make(device, dtype))

    return run


def _check_shrink(p: Problem) -> None:
    X, A, seed = p["X"], p["A"], p["seed"]
    check_close(shrink(X, A, None, 0.0), X @ A.t(), X.double() @ A.double().t())
    kept = X * _dropout.keep_mask(seed, _N, _K, 0.3)
    check_close(shrink(X, A, seed, 0.3), kept @ A.t(), kept.double() @ A.double().t())


def _check_expand(p: Problem) -> None:
    ours = [y.clone() for y in p["Ys"]]
    expand(ours, p["S"], p["offsets"], p["Bs"], p["scalings"])
    for y, Y, first, B, s in zip(ours, p["Ys"], p["offsets"], p["Bs"], p["scalings"], strict=True):
        S = p["S"][:, first : first + B.shape[1]]
        exact = Y.double() + s * (S.double() @ B.double().t())
        check_close(y, Y + s * (S @ B.t()), exact)


def _check_drop(p: Problem) -> None:
    expected = p["X"] * _dropout.keep_mask(p["seed"], _N, _K, 0.3)
    if not torch.equal(drop(p["X"], p["seed"], 0.3), expected):
        raise ArithmeticError("the mask differs from torch's")
    added = drop(p["X"], p["seed"], 0.3, p["X"].clone())
    check_close(added, p["X"] + expected, p["X"].double() + expected.double())


register("lora_shrink", each_dtype(_check_shrink))


register("lora_expand", each_dtype(_check_expand))


register("lora_drop", each_dtype(_check_drop))
