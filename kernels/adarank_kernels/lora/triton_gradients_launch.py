"""Launchers and numerical self-checks of the kernels in `triton_gradients.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from adarank_kernels.lora import dropout as _dropout
from adarank_kernels.lora import triton_gradients as kernels
from adarank_kernels.lora.triton_launch import (
    SLOTS,
    Problem,
    each_dtype,
    one_dtype,
    padded,
    precision,
    problem,
    slots,
)
from adarank_kernels.runtime.registry import cdiv, check_close, kind, launch, on_device, register

BLOCKS_R = (16, 32, 64)
CAST_R = 32  # ranks up to which a kernel casts float32 B itself: for more, sm_80 would spill
GRAD_S = {"BLOCK_M": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
ON_ROCM = {"num_stages": 2}  # of dS: a third would take more than the 64 KiB that there are
OUTER = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
DROPPED = OUTER | {"BLOCK_N": 64}  # drawing a mask takes registers
WIDE = 128  # BLOCK_R of dA, whose ranks are a whole group's: fewer passes over X, fewer masks drawn
TOTAL = {"BLOCK": 1024, "AT_ONCE": 8, "num_warps": 4, "num_stages": 1}

PROGRAMS = 256  # wanted at least: about two for each multiprocessor of a large card
STEPS = 4  # of the loop in a share, at least


def _shares(programs: int, steps: int, read: int, size: int) -> int:
    """Into how many shares a product of `programs` tiles with `steps` each is cut.

    By shapes alone, so that the same input gives the same bits on any card. Their float32 sums, of
    `size` numbers each, take at most a quarter of the bytes that are read.
    """
    most = read // (4 * 4 * max(size, 1))
    return max(1, min(cdiv(PROGRAMS, max(programs, 1)), steps // STEPS, most))


def grad_s_shares(N: int, outs: Sequence[int], ranks: Sequence[int], itemsize: int = 2) -> int:
    """Shares of dS, of the columns of dY."""
    tiles = sum([cdiv(rank, block_of_rank(max(ranks))) for rank in ranks])
    steps = cdiv(max(outs), GRAD_S["BLOCK_K"])
    size = N * sum([padded(rank) for rank in ranks])
    return _shares(cdiv(N, GRAD_S["BLOCK_M"]) * tiles, steps, N * sum(outs) * itemsize, size)


def outer_shares(
    N: int, outs: Sequence[int], ranks: Sequence[int], drops: bool = False, itemsize: int = 2
) -> int:
    """Shares of dB, or of dA where it `drops`, of the rows of dY or X."""
    options, block_r = DROPPED if drops else OUTER, block_of_rank(max(ranks), drops)
    sizes = list(zip(outs, ranks, strict=True))
    tiles = sum([cdiv(out, options["BLOCK_N"]) * cdiv(rank, block_r) for out, rank in sizes])
    size = sum([out * rank for out, rank in sizes])
    return _shares(tiles, cdiv(N, options["BLOCK_M"]), N * sum(outs) * itemsize, size)


def block_of_rank(rank: int, wide: bool = False) -> int:
    """BLOCK_R for ranks up to this one; `wide`: of dA."""
    blocks = (*BLOCKS_R, WIDE) if wide else BLOCKS_R
    return next((block for block in blocks if block >= rank), blocks[-1])


def fits(matrices: Sequence[Tensor]) -> bool:
    """Whether the kernels read dY [N, out] or X [N, in] like these."""
    return all([m.shape[1] % 16 == 0 for m in matrices])


def _readable(matrix: Tensor) -> Tensor:
    """Elements of a row side by side, each row at 16 of them."""
    at = matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 16 == 0
    if at and matrix.stride(-1) == 1:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _in_slots(matrices: Sequence[Tensor]) -> list[Tensor]:
    return [*matrices, *[matrices[0]] * (SLOTS - len(matrices))]


def _table(rows: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    padded_rows = [(*row, *[0] * (8 - len(row))) for row in rows]
    return torch.tensor(padded_rows, dtype=torch.int32).to(device)


def _shapes(matrices: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """(columns, stride of the rows) of each."""
    return tuple([(m.shape[1], m.stride(0)) for m in matrices])


@lru_cache(maxsize=4096)
def _grad_s_tiles(
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    first: Sequence[int],
    block_r: int,
    device: torch.device,
) -> tuple[Tensor, int]:
    """A row per tile: module, column of dS, rank, padded rank, first rank, out, stride of dY."""
    rows = [
        (m, start, rank, padded(rank), r, out, stride)
        for m, ((out, stride), rank, start) in enumerate(zip(shapes, ranks, first, strict=True))
        for r in range(0, rank, block_r)
    ]
    return _table(rows, device), len(rows)


@lru_cache(maxsize=4096)
def _outer_tiles(
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    first: Sequence[int],
    starts: Sequence[int],
    block: int,
    block_r: int,
    device: torch.device,
) -> tuple[Tensor, int]:
    """A row per tile: module, column of S, rank, first rank, column, out, stride, where it goes."""
    each = enumerate(zip(shapes, ranks, first, starts, strict=True))
    rows = [
        (m, offset, rank, r, column, out, stride, start)
        for m, ((out, stride), rank, offset, start) in each
        for r in range(0, rank, block_r)
        for column in range(0, out, block)
    ]
    return _table(rows, device), len(rows)


@lru_cache(maxsize=4096)
def _factors(scalings: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(scalings, dtype=torch.float32).to(device)


def _total(shares: Tensor, out: Tensor) -> None:
    """Add [shares, ...] into out [...]."""
    grid = cdiv(out.numel(), TOTAL["BLOCK"]), 1
    integers = (out.numel(), shares.shape[0])
    key = out.device, out.dtype, *map(kind, integers)
    launch(kernels.total_kernel, key, grid, (shares, out, *integers), TOTAL)


def _with_shares(out: Tensor, shares: int) -> Tensor:
    """Where the sums of the shares go: a buffer, or `out` itself if there is but one."""
    return out if shares == 1 else out.new_empty(shares, *out.shape, dtype=torch.float32)


def grad_s(
    dYs: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    first: Sequence[int],
    width: int,
) -> Tensor:
    """DS [N, width]: scalings[m] dY_m B_m from column first[m] on, zeros up to the padded rank."""
    N, like = dYs[0].shape[0], dYs[0]
    dS = like.new_empty(N, width)
    if not dS.numel():
        return dS
    dYs = [_readable(dY) for dY in dYs]
    ranks = [B.shape[1] for B in Bs]
    block_r = block_of_rank(max(ranks))
    shares = grad_s_shares(N, [dY.shape[1] for dY in dYs], ranks, like.element_size())
    out = _with_shares(dS, shares)
    for i in range(0, len(dYs), SLOTS):
        some = slice(i, i + SLOTS)
        Gs, of_B = dYs[some], one_dtype(Bs[some], like.dtype)
        if block_r > CAST_R:
            of_B = [B.to(like.dtype) for B in of_B]
        table, rows = _grad_s_tiles(
            _shapes(Gs), tuple(ranks[some]), tuple(first[some]), block_r, like.device
        )
        constants = GRAD_S | {"BLOCK_R": block_r, "PRECISION": precision(like.dtype)}
        constants |= ON_ROCM if torch.version.hip else {}
        integers = (N, width, shares)
        key = like.device, like.dtype, of_B[0].dtype, out.dtype, *map(kind, integers)
        factors = _factors(tuple(scalings[some]), like.device)
        arguments = (out, *_in_slots(Gs), *slots(of_B), factors, table, *integers)
        grid = cdiv(N, GRAD_S["BLOCK_M"]), rows * shares
        with on_device(like.device):
            launch(kernels.grad_s_kernel, key, grid, arguments, constants)
    if shares > 1:
        with on_device(like.device):
            _total(out, dS)
    return dS


def _outer(
    result: Tensor,
    Gs: Sequence[Tensor],
    S: Tensor,
    first: Sequence[int],
    ranks: Sequence[int],
    starts: Sequence[int],
    scalings: Sequence[float],
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> None:
    """Fill the flat `result`: scalings[m] G_m^T S_m from element starts[m] on."""
    N, S = Gs[0].shape[0], _readable(S)
    Gs = [_readable(G) for G in Gs]
    drops, outs = seed is not None, [G.shape[1] for G in Gs]
    options, block_r = DROPPED if drops else OUTER, block_of_rank(max(ranks), drops)
    shares = outer_shares(N, outs, ranks, drops, S.element_size())
    out = _with_shares(result, shares)
    for i in range(0, len(Gs), SLOTS):
        some = slice(i, i + SLOTS)
        table, rows = _outer_tiles(
            _shapes(Gs[some]), tuple(ranks[some]), tuple(first[some]), tuple(starts[some]),
            options["BLOCK_N"], block_r, S.device,
        )  # fmt: skip
        constants = options | {
            "BLOCK_R": block_r,
            "DROPOUT": drops,
            "PRECISION": precision(S.dtype),
        }
        integers = (N, S.stride(0), result.numel(), shares, _dropout.threshold(dropout))
        seeds = S if seed is None else seed
        key = S.device, S.dtype, out.dtype, seeds.data_ptr() % 16 == 0, *map(kind, integers)
        factors = _factors(tuple(scalings[some]), S.device)
        arguments = (out, *_in_slots(Gs[some]), S, seeds, factors, table, *integers)
        with on_device(S.device):
            launch(kernels.outer_kernel, key, (rows, shares), arguments, constants)
    if shares > 1:
        with on_device(S.device):
            _total(out, result)


def grad_b(
    dYs: Sequence[Tensor],
    S: Tensor,
    first: Sequence[int],
    ranks: Sequence[int],
    scalings: Sequence[float],
    dtype: torch.dtype,
) -> list[Tensor]:
    """dB_m [out_m, r_m] = scalings[m] dY_m^T S_m in `dtype`, from column first[m] of S on."""
    sizes = [dY.shape[1] * rank for dY, rank in zip(dYs, ranks, strict=True)]
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += size
    flat = S.new_zeros(end, dtype=dtype) if not len(S) else S.new_empty(end, dtype=dtype)
    if len(S) and end:
        _outer(flat, dYs, S, first, ranks, starts, scalings)
    return [
        piece.view(dY.shape[1], rank)
        for piece, dY, rank in zip(flat.split(sizes), dYs, ranks, strict=True)
    ]


def grad_a(dS: Tensor, X: Tensor, seed: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    """DS^T drop(X) [width, in] in `dtype`, without the scale of the dropout."""
    width, K = dS.shape[1], X.shape[1]
    if not (len(X) and width and K):
        return X.new_zeros(width, K, dtype=dtype)
    result = X.new_empty(width * K, dtype=dtype)
    _outer(result, [X], dS, [0], [width], [0], [1.0], seed, dropout)
    return result.view(width, K)


# Self-checks: as those of triton_launch.py, large enough for several shares.


def _larger_problem(device: torch.device, dtype: torch.dtype) -> Problem:
    return problem(device, dtype, rows=1300, outs=(1104, 528, 48, 256))


def _scaled_mm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The vendor's product, rounded once."""
    return torch.addmm(a.new_zeros(1, 1), a, b, beta=0.0, alpha=scaling)


def _same_again(ours: Tensor, again: Tensor) -> None:
    if not torch.equal(ours, again):
        raise ArithmeticError("the same input gave other bits")


def _check_grad_s(p: Problem) -> None:
    width = p["S"].shape[1]
    given = p["Ys"], p["Bs"], p["scalings"], p["offsets"], width
    ours = grad_s(*given)
    _same_again(ours, grad_s(*given))
    for dY, B, s, first in zip(p["Ys"], p["Bs"], p["scalings"], p["offsets"], strict=True):
        rank = B.shape[1]
        exact = s * (dY.double() @ B.double())
        check_close(ours[:, first : first + rank], _scaled_mm(dY, B, s), exact)
        if ours[:, first + rank : first + padded(rank)].count_nonzero():
            raise ArithmeticError("the padding of dS is not zero")


def _check_grad_b(p: Problem) -> None:
    ranks = [B.shape[1] for B in p["Bs"]]
    for dtype in (p["S"].dtype, torch.float32):
        given = p["Ys"], p["S"], p["offsets"], ranks, p["scalings"], dtype
        ours, again = grad_b(*given), grad_b(*given)
        for m, (dY, s) in enumerate(zip(p["Ys"], p["scalings"], strict=True)):
            _same_again(ours[m], again[m])
            S = p["S"][:, p["offsets"][m] :][:, : ranks[m]]
            exact = s * (dY.double().t() @ S.double())
            check_close(ours[m], _scaled_mm(dY.t(), S, s).to(dtype), exact)


def _check_grad_a(p: Problem) -> None:
    dS, X, seed = p["S"], p["X"][:, :192], p["seed"]
    kept = X * _dropout.keep_mask(seed, X.shape[0], X.shape[1], 0.3)
    ours = grad_a(dS, X, seed, 0.3, X.dtype)
    _same_again(ours, grad_a(dS, X, seed, 0.3, X.dtype))
    check_close(ours, dS.t() @ kept, dS.double().t() @ kept.double())


register("lora_grad_s", each_dtype(_check_grad_s, _larger_problem), waits=True)


register("lora_grad_b", each_dtype(_check_grad_b, _larger_problem), waits=True)


register("lora_grad_a", each_dtype(_check_grad_a, _larger_problem), waits=True)
