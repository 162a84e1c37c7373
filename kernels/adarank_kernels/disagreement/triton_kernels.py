"""Triton kernels of the disagreement of K variants; `_disagreement_launch.py` launches them.

    rows     each row's logsumexp, and its argmax (lowest index on ties) or its shift against row 0
    pairs    the sum over outputs of what a pair of rows is apart in each, by METRIC

Both take outputs that exist, [R, tokens, V], or multiply rows [R, tokens, D] by the head as they go
(HEAD): logits then stay in registers. Sums of splits of the outputs are stored apart and added by
the host in a fixed order: no atomics.

Outputs that exist come relative to a base, the log-probabilities b of row 0: log p_k = b + r_k. For
two rows, d = r_j - r_i and m = (p_i + p_j) / 2,

    tv       |p_i - p_j|, of p_k - e^b = e^b (e^r_k - 1)
    kl       p_i log(p_i / p_j) - p_i + p_j   = p_i (e^d - 1 - d)
    js       m log 2 - m log(1 + e^-|d|) - m |d| / (1 + e^|d|)

No term is negative and each keeps its digits however small d is, so float32 is enough; an error of
a row's logsumexp enters kl only squared.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def _outputs(
    x_ptr, w_ptr, bias_ptr, k, token, valid, cols, tokens, D, V, stride_xr, stride_xt,
    BLOCK_D: tl.constexpr, HEAD: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows (k, token) [M] at cols [BLOCK_V], float32; bias [V] of a head, else [tokens, V]."""
    p_x = x_ptr + (k.to(tl.int64) * stride_xr + token.to(tl.int64) * stride_xt)[:, None]
    m_v = cols[None, :] < V
    if HEAD:
        ds = tl.arange(0, BLOCK_D)
        p_w = w_ptr + cols.to(tl.int64)[None, :] * D
        x = tl.zeros((k.shape[0], cols.shape[0]), tl.float32)
        for d in range(0, D, BLOCK_D):
            m_h = valid[:, None] & (d + ds[None, :] < D)
            h = tl.load(p_x + d + ds[None, :], mask=m_h, other=0.0)
            w = tl.load(p_w + d + ds[:, None], mask=m_v & (d + ds[:, None] < D), other=0.0)
            x = tl.dot(h, w, x, input_precision=PRECISION)
        if HAS_BIAS:
            x += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    else:
        m_x = valid[:, None] & m_v
        x = tl.load(p_x + cols[None, :], mask=m_x, other=0.0).to(tl.float32)
        if HAS_BIAS:
            p_bias = bias_ptr + token.to(tl.int64)[:, None] * V + cols[None, :]
            x += tl.load(p_bias, mask=m_x, other=0.0)
    return x


@triton.jit
def rows_kernel(
    x_ptr, w_ptr, bias_ptr, base_ptr, lse_ptr, largest_ptr, second_ptr,
    R, tokens, D, V, stride_xr, stride_xt, per_split,
    M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HEAD: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per split and row [R, tokens]: the logsumexp, the largest and `second`.

    That is with a head the largest one's first place; without, as e^base sums to 1, the sum of
    e^(base + x) less 1.
    """
    m = tl.program_id(0) * M + tl.arange(0, M)
    k, token, valid = m // tokens, m % tokens, m < R * tokens
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    second = tl.zeros((M,), second_ptr.dtype.element_ty)
    first = tl.program_id(1) * per_split
    for v in range(first, min(first + per_split, V), BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V)
        x = _outputs(x_ptr, w_ptr, bias_ptr, k, token, valid, cols, tokens, D, V, stride_xr,
                     stride_xt, BLOCK_D, HEAD, HAS_BIAS, PRECISION)  # fmt: skip
        if not HEAD:
            p_base = base_ptr + token.to(tl.int64)[:, None] * V + cols[None, :]
            m_base = valid[:, None] & (cols[None, :] < V)
            base = tl.load(p_base, mask=m_base, other=float("-inf"))
            second += tl.sum(_moved(base, x), 1)
            x += base
        x = tl.where(cols[None, :] < V, x, float("-inf"))
        here = tl.max(x, 1)
        if HEAD:
            where = tl.min(tl.where(x == here[:, None], cols[None, :], V), 1)
            second = tl.where(here > largest, where, second)  # an earlier block keeps a tie
        both = tl.maximum(here, largest)
        anchor = tl.where(both == float("-inf"), 0.0, both)
        total = total * tl.exp(largest - anchor) + tl.sum(tl.exp(x - anchor[:, None]), 1)
        largest = both
    p = tl.program_id(1).to(tl.int64) * R * tokens + m
    tl.store(lse_ptr + p, largest + tl.log(total), mask=valid)
    tl.store(largest_ptr + p, largest, mask=valid)
    tl.store(second_ptr + p, second, mask=valid)


@triton.jit
def _apart(x, y, p, base, METRIC: tl.constexpr):
    """What rows x and y are apart in each output; kl and js of log-probabilities less base."""
    if METRIC == "kl" or METRIC == "js":
        d, q = y - x, tl.exp(base + y)
        near = tl.abs(d) < 0.5
    if METRIC == "kl":
        found = tl.where(near, p * _curve(d), q - p - p * d)
        found = tl.where(y == float("-inf"), float("inf"), found)
        found = tl.where(x == float("-inf"), q, found)
    elif METRIC == "js":
        h = d * d * 0.25  # |d|/2 tanh(|d|/2) - log cosh(|d|/2) as a series
        series = h * (0.5 - h * (1 / 4 - h * (1 / 9 - h * (17 / 360 - h * (31 / 1575)))))
        far = tl.minimum(tl.abs(d), 100.0)
        u = tl.exp(-far)
        curve = tl.where(near, series, 0.6931471805599453 - tl.log(1 + u) - far * u / (1 + u))
        found = tl.where(p + q > 0, (p + q) * 0.5 * curve, 0.0)
    else:
        found = tl.where(x == y, 0.0, tl.abs(x - y))  # equal infinities
    return found


@triton.jit
def pairs_kernel(
    x_ptr, w_ptr, bias_ptr, base_ptr, lse_ptr, out_ptr,
    R, tokens, D, V, stride_xr, stride_xt, per_split,
    M: tl.constexpr, K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    METRIC: tl.constexpr, ALL: tl.constexpr, HEAD: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
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
    if METRIC != "l1":
        p_lse = lse_ptr + k.to(tl.int64) * tokens + token
        lse = tl.load(p_lse, mask=valid, other=0.0)[:, None]
    first = tl.program_id(1) * per_split
    for v in range(first, min(first + per_split, V), BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V)
        x = _outputs(x_ptr, w_ptr, bias_ptr, k, token, valid, cols, tokens, D, V, stride_xr,
                     stride_xt, BLOCK_D, HEAD, HAS_BIAS, PRECISION)  # fmt: skip
        base, p = 0.0, 0.0
        if METRIC != "l1":
            x -= lse
            if not HEAD:
                p_base = base_ptr + token.to(tl.int64)[:, None] * V + cols[None, :]
                m_base = valid[:, None] & (cols[None, :] < V)
                base = tl.load(p_base, mask=m_base, other=0.0)
            if METRIC == "tv":
                x = tl.exp(x) if HEAD else _moved(base, x)
                x = tl.where(cols[None, :] < V, x, 0.0)
            else:
                x = tl.where(cols[None, :] < V, x, float("-inf"))
                p = tl.exp(base + x)
        for s in range(1, (K if METRIC == "kl" else K // 2 + 1) if ALL else 2):
            other = group + (k + s) % K if ALL else group
            y = tl.gather(x, tl.broadcast_to(other[:, None], (M, BLOCK_V)), 0)
            apart = tl.sum(_apart(x, y, p, base, METRIC), 1)
            acc += tl.where(shifts == s, apart[:, None], 0.0)
    size = tl.num_programs(0).to(tl.int64) * M
    p_out = out_ptr + (tl.program_id(1) * size + m)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(p_out, acc)
