"""Triton kernels that compare up to 16 rows of outputs, and their launchers.

    rows     each row's logsumexp, from its shift against row 0
    pairs    the sum over outputs of what a pair of rows is apart in each, by METRIC

Outputs [R, tokens, V] exist. Sums of splits of the outputs are stored apart and added by the host
in a fixed order: no atomics.

For tv, kl and js outputs come relative to a base, the log-probabilities b of row 0:
log p_k = b + r_k. For two rows, d = r_j - r_i and m = (p_i + p_j) / 2,

    tv       |p_i - p_j|, of p_k - e^b = e^b (e^r_k - 1)
    kl       p_i log(p_i / p_j) - p_i + p_j   = p_i (e^d - 1 - d)
    js       m log 2 - m log(1 + e^-|d|) - m |d| / (1 + e^|d|)

No term is negative and each keeps its digits however small d is, so float32 is enough; an error of
a row's logsumexp enters kl only squared.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from adarank_kernels.runtime.registry import cdiv, check_close, on_device, register

METRICS = ("l1", "tv", "kl", "js")
MAX_ROWS = 16  # variants, the reference included
SPLIT = 4096  # outputs a program adds up: the same on every device, so that sums are too
# One known-good configuration; M rows are M / K tokens.
PAIRS = {"M": 16, "BLOCK_V": 512, "num_warps": 8, "num_stages": 2}


@triton.jit
def _curve(x):
    """e^x - 1 - x for |x| < 0.5; the first term left out is below 5e-8 of the sum."""
    tail = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
    return x * x * (0.5 + x * (1 / 6 + x * tail))


@triton.jit
def _moved(base, r):
    """e^base (e^r - 1)."""
    p = tl.exp(base)
    return tl.where(tl.abs(r) < 0.5, p * (r + _curve(r)), tl.exp(base + r) - p)


@triton.jit
def _relative(x_ptr, shift_ptr, base_ptr, k, token, valid, cols, V, stride_xr, stride_xt):
    """Rows (k, token) [M] at cols [BLOCK_V] plus their token's shift, and its base; float32.

    Beyond V the base is -inf: what is there has no probability and is no difference.
    """
    inside = valid[:, None] & (cols[None, :] < V)
    p_x = x_ptr + (k.to(tl.int64) * stride_xr + token.to(tl.int64) * stride_xt)[:, None]
    x = tl.load(p_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    p_token = token.to(tl.int64)[:, None] * V + cols[None, :]
    x += tl.load(shift_ptr + p_token, mask=inside, other=0.0)
    return x, tl.load(base_ptr + p_token, mask=inside, other=float("-inf"))


@triton.jit
def rows_kernel(
    x_ptr, shift_ptr, base_ptr, lse_ptr, moved_ptr,
    R, tokens, V, stride_xr, stride_xt, per_split, M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Per split and row [R, tokens]: logsumexp of base + x; as e^base sums to 1, e^lse less 1."""
    m = tl.program_id(0) * M + tl.arange(0, M)
    k, token, valid = m // tokens, m % tokens, m < R * tokens
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    moved = tl.zeros((M,), tl.float32)
    first = tl.program_id(1) * per_split
    for v in range(first, min(first + per_split, V), BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V)
        x, base = _relative(
            x_ptr, shift_ptr, base_ptr, k, token, valid, cols, V, stride_xr, stride_xt
        )
        moved += tl.sum(_moved(base, x), 1)
        x += base
        both = tl.maximum(tl.max(x, 1), largest)
        anchor = tl.where(both == float("-inf"), 0.0, both)
        total = total * tl.exp(largest - anchor) + tl.sum(tl.exp(x - anchor[:, None]), 1)
        largest = both
    p = tl.program_id(1).to(tl.int64) * R * tokens + m
    tl.store(lse_ptr + p, largest + tl.log(total), mask=valid)
    tl.store(moved_ptr + p, moved, mask=valid)


@triton.jit
def _apart(x, y, p, base, METRIC: tl.constexpr):
    """What rows x and y are apart in each output; kl and js of log-probabilities less base."""
    if METRIC == "kl" or METRIC == "js":
        d, q = y - x, tl.exp(base + y)
    if METRIC == "kl":
        found = tl.where(tl.abs(d) < 0.5, p * _curve(d), q - p - p * d)
        found = tl.where(y == float("-inf"), float("inf"), found)
        found = tl.where(x == float("-inf"), q, found)
    elif METRIC == "js":
        h = d * d * 0.25  # |d|/2 tanh(|d|/2) - log cosh(|d|/2) as a series
        series = h * (0.5 - h * (1 / 4 - h * (1 / 9 - h * (17 / 360 - h * (31 / 1575)))))
        far = tl.minimum(tl.abs(d), 100.0)
        u = tl.exp(-far)
        curve = tl.where(far < 0.5, series, 0.6931471805599453 - tl.log(1 + u) - far * u / (1 + u))
        found = tl.where(p + q > 0, (p + q) * 0.5 * curve, 0.0)
    else:
        found = tl.where(x == y, 0.0, tl.abs(x - y))  # equal infinities
    return found


@triton.jit
def pairs_kernel(
    x_ptr, shift_ptr, base_ptr, lse_ptr, out_ptr,
    R, tokens, V, stride_xr, stride_xt, per_split,
    M: tl.constexpr, K: tl.constexpr, BLOCK_V: tl.constexpr, METRIC: tl.constexpr,
    ALL: tl.constexpr,
):  # fmt: skip
    """-> out [splits, tokens * K padded to M, K]: of row k of a token and shift s, the sum.

    A tile holds whole groups of K rows, the variants of one token, K a power of two. A rolled loop
    compares row k of each group with row (k + s) % K, s = 1 .. K / 2 (kl, not symmetric: K - 1), so
    every pair is met and the rows are read once. Not ALL: with row 0 only, at s = 1.
    """
    m = tl.program_id(0) * M + tl.arange(0, M)
    k, token = m % K, m // K
    valid = (k < R) & (token < tokens)
    group, shifts = tl.arange(0, M) // K * K, tl.arange(0, K)[None, :]
    acc = tl.zeros((M, K), tl.float32)
    if METRIC == "l1":
        p_x = x_ptr + (k.to(tl.int64) * stride_xr + token.to(tl.int64) * stride_xt)[:, None]
    else:
        p_lse = lse_ptr + k.to(tl.int64) * tokens + token
        lse = tl.load(p_lse, mask=valid, other=0.0)[:, None]
    first = tl.program_id(1) * per_split
    for v in range(first, min(first + per_split, V), BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V)
        base, p = 0.0, 0.0
        if METRIC == "l1":
            inside = valid[:, None] & (cols[None, :] < V)
            x = tl.load(p_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        else:
            x, base = _relative(
                x_ptr, shift_ptr, base_ptr, k, token, valid, cols, V, stride_xr, stride_xt
            )
            x -= lse
            if METRIC == "tv":
                x = _moved(base, x)
            else:
                p = tl.exp(base + x)
        for s in range(1, (K if METRIC == "kl" else K // 2 + 1) if ALL else 2):
            other = group + (k + s) % K if ALL else group
            y = tl.gather(x, tl.broadcast_to(other[:, None], (M, BLOCK_V)), 0)
            apart = tl.sum(_apart(x, y, p, base, METRIC), 1)
            acc += tl.where(shifts == s, apart[:, None], 0.0)
    size = tl.num_programs(0).to(tl.int64) * M
    p_out = out_ptr + (tl.program_id(1) * size + m)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(p_out, acc)


def padded(R: int) -> int:
    """Rows of a token's group: a power of two, 8 at least."""
    return 8 if R <= 8 else 16


def pairs_options(metric: str) -> dict[str, int]:
    """Half as wide a tile where twice as many are in registers."""
    return PAIRS if metric == "l1" else PAIRS | {"BLOCK_V": PAIRS["BLOCK_V"] // 2}


def compare(
    x: Tensor,
    metric: str,
    every: bool = True,
    shift: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Distances of up to 16 rows, l1 summed over outputs; float64, `every` pair [R, R, tokens].

    Args:
        x: outputs [R, tokens, V] but for `shift`; any floating dtype, last stride 1.
        metric: "l1", "tv", "kl" (row i, column j) or "js".
        every: False: row 0 only, [R - 1, tokens]; kl as KL(p_k || p_0).
        shift: float32 [tokens, V], added to every row of a token; for tv, kl and js.
        base: log-probabilities, float32 [tokens, V], finite, that x + shift is relative to: best
            such that it is small. For tv, kl and js.
    """
    (R, tokens, V), K = x.shape, padded(len(x))
    if metric == "l1":
        shift = base = lse = x  # not read
    else:
        assert shift is not None and base is not None
        shift, base = shift.contiguous(), base.contiguous()
        lse = _logsumexp(x, shift, base)
    options = pairs_options(metric)
    blocks, splits = cdiv(tokens * K, options["M"]), cdiv(V, SPLIT)
    out = torch.empty(splits, blocks * options["M"], K, device=x.device)
    with on_device(x.device):
        pairs_kernel[(blocks, splits)](
            x, shift, base, lse, out,
            R, tokens, V, x.stride(0), x.stride(1), SPLIT, K=K, METRIC=metric, ALL=every, **options,
        )  # fmt: skip
    sums = out.double().sum(0)[: tokens * K].view(tokens, K, K)
    found = _unrolled(sums, R, metric) if every else sums[:, 1:R, 1].t().contiguous()
    return found / 2 if metric == "tv" else found


def _logsumexp(x: Tensor, shift: Tensor, base: Tensor) -> Tensor:
    """Of base + shift + x: [R, tokens], to the last digit also where it is near 0."""
    R, tokens, V = x.shape
    splits = cdiv(V, SPLIT)
    lse, moved = torch.empty(2, splits, R, tokens, device=x.device)
    with on_device(x.device):
        rows_kernel[(cdiv(R * tokens, PAIRS["M"]), splits)](
            x, shift, base, lse, moved, R, tokens, V, x.stride(0), x.stride(1), SPLIT, **PAIRS
        )
    lse, moved = lse.logsumexp(0), moved.sum(0)  # e^lse - 1
    return torch.where(moved.abs() < 0.5, moved.log1p(), lse)


def _unrolled(sums: Tensor, R: int, metric: str) -> Tensor:
    """[tokens, K, K] of rows and shifts -> [R, R, tokens]."""
    i, shift = _pairs(R, sums.shape[-1], metric == "kl", sums.device)
    return sums[:, i, shift].permute(1, 2, 0).contiguous()


@lru_cache(maxsize=256)
def _pairs(R: int, K: int, ordered: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where `pairs_kernel` puts the sum of rows i and j: [R, R] of rows and of shifts."""
    i = torch.arange(R)[:, None]
    j = i.t()
    if not ordered:  # one sum for (i, j) and (j, i): of that row from which j is K / 2 at most
        low, high = torch.minimum(i, j), torch.maximum(i, j)
        near = high - low <= K // 2
        i, j = torch.where(near, low, high), torch.where(near, high, low)
    return i.to(device), ((j - i) % K).to(device)


# What a kernel must do right on a device before it is used there
def _exact(f: Tensor, metric: str) -> Tensor:
    """What `compare` should give for [R, tokens, V]."""
    if metric == "l1":
        return (f[:, None] - f).abs().double().sum(-1)
    log_p = f.log_softmax(-1)
    p, log_m = log_p.exp(), torch.logaddexp(log_p[:, None], log_p) - math.log(2)
    if metric == "tv":
        return (p[:, None] - p).abs().double().sum(-1) / 2
    if metric == "kl":
        return (p[:, None] * (log_p[:, None] - log_p)).double().sum(-1)
    own = (p[:, None] * (log_p[:, None] - log_m)).double().sum(-1)
    return (own + own.transpose(0, 1)) / 2


def _check_pairs(device: torch.device) -> None:
    for R, tokens, V in ((3, 5, 777), (16, 1, 4100)):
        generator = torch.Generator().manual_seed(R + tokens + V)
        outputs = torch.randn(R, tokens, V, generator=generator).to(device) / 8
        log_p = outputs[0].log_softmax(-1)
        for metric in METRICS:
            x = outputs / V if metric == "l1" else outputs
            right, torchs = _exact(x.double(), metric), _exact(x, metric)
            shift, base = (None, None) if metric == "l1" else (-x[0], log_p)
            check_close(compare(x, metric, True, shift, base), torchs, right)
            check_close(compare(x, metric, False, shift, base), torchs[1:, 0], right[1:, 0])


register("disagreement_pairs", _check_pairs)
