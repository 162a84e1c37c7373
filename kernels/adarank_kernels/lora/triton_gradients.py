"""Triton kernels of a group's backward pass, in the layout of `triton_kernels.py`.

    grad_s   dS_m = s_m dY_m B_m            one launch for up to four modules
    outer    dB_m = s_m dY_m^T S_m          likewise; and dA = dS^T drop(X), the mask drawn inside
    total    the sum of a product's shares

Each is one pass over dY or X (two for ranks beyond a tile's). A card has room for more programs
than such a product has tiles, so it is cut into shares, dS by the columns of dY, the others by its
rows. The sums of a share are float32, at most a quarter of dY's bytes in all; `total` adds them in
their order, so that one input gives the same bits again. Columns come in multiples of 16, from row
to row too: masks for others take more registers than there are. `triton_gradients_launch.py`
launches them.

No card has said yet whether they are faster than the vendor's GEMMs: they are registered as
waiting, and run only where a benchmark chooses them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adarank_kernels.lora.triton_kernels import keep, slot


@triton.jit
def grad_s_kernel(
    out_ptr,
    g0,
    g1,
    g2,
    g3,
    b0,
    b1,
    b2,
    b3,
    scaling_ptr,
    table_ptr,
    N,
    width,
    shares,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """DS [N, width], or [shares, N, width]; a row of `table_ptr` a tile of ranks of one module."""
    share = tl.program_id(1) % shares
    entry = table_ptr + tl.program_id(1) // shares * 8
    module = tl.load(entry)
    offset = tl.multiple_of(tl.load(entry + 1), 16)
    rank = tl.load(entry + 2)
    end = tl.multiple_of(tl.load(entry + 3), 16)
    first_rank = tl.multiple_of(tl.load(entry + 4), 16)
    out = tl.multiple_of(tl.load(entry + 5), 16)
    stride_gn = tl.multiple_of(tl.load(entry + 6), 16)
    g_ptr, b_ptr = slot(module, g0, g1, g2, g3), slot(module, b0, b1, b2, b3)
    a_share = tl.cdiv(tl.cdiv(out, BLOCK_K), shares) * BLOCK_K
    first = share * a_share
    stop = tl.multiple_of(tl.minimum(first + a_share, out), 16)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = tl.arange(0, BLOCK_K)
    rs = first_rank + tl.arange(0, BLOCK_R)
    m_rows, m_ranks = rows[:, None] < N, rs[None, :] < rank
    p_g = g_ptr + rows.to(tl.int64)[:, None] * stride_gn + first + ks[None, :]
    p_b = b_ptr + (first + ks)[:, None] * rank + rs[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(first, stop, BLOCK_K):
        g = tl.load(p_g, mask=m_rows & (k + ks[None, :] < stop), other=0.0)
        b = tl.load(p_b, mask=(k + ks[:, None] < stop) & m_ranks, other=0.0)
        acc = tl.dot(g, b.to(g.dtype), acc, input_precision=PRECISION)
        p_g += BLOCK_K
        p_b += BLOCK_K * rank
    acc *= tl.load(scaling_ptr + module)
    p_out = out_ptr + share.to(tl.int64) * N * width
    p_out += rows.to(tl.int64)[:, None] * width + offset + rs[None, :]
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_rows & (rs[None, :] < end))


@triton.jit
def outer_kernel(
    out_ptr,
    g0,
    g1,
    g2,
    g3,
    s_ptr,
    seed_ptr,
    scaling_ptr,
    table_ptr,
    N,
    stride_sn,
    size,
    shares,
    dropped,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s_m G_m^T S_m [out, rank], with DROPOUT transposed S^T drop(G); [shares, size] in all.

    A row of `table_ptr` a tile of columns of G and of ranks of one module.
    """
    entry = table_ptr + tl.program_id(0) * 8
    module = tl.load(entry)
    offset = tl.multiple_of(tl.load(entry + 1), 16)
    rank = tl.load(entry + 2)
    first_rank = tl.multiple_of(tl.load(entry + 3), 16)
    first = tl.multiple_of(tl.load(entry + 4), 16)
    out = tl.multiple_of(tl.load(entry + 5), 16)
    stride_gn = tl.multiple_of(tl.load(entry + 6), 16)
    start = tl.multiple_of(tl.load(entry + 7), 16)
    g_ptr = slot(module, g0, g1, g2, g3)
    share = tl.program_id(1)
    a_share = tl.cdiv(tl.cdiv(N, BLOCK_M), shares) * BLOCK_M
    row = share * a_share
    stop = tl.minimum(row + a_share, N)
    ms = tl.arange(0, BLOCK_M)
    cols = first + tl.arange(0, BLOCK_N)
    rs = first_rank + tl.arange(0, BLOCK_R)
    m_cols, m_ranks = cols < out, rs < rank
    rows = (row + ms).to(tl.int64)
    p_g = g_ptr + rows[:, None] * stride_gn + cols[None, :]
    p_s = s_ptr + rows[:, None] * stride_sn + offset + rs[None, :]
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(row, stop, BLOCK_M):
        m_rows = (m + ms < stop)[:, None]
        g = tl.load(p_g, mask=m_rows & m_cols[None, :], other=0.0)
        s = tl.load(p_s, mask=m_rows & m_ranks[None, :], other=0.0)
        if DROPOUT:
            g = g * keep(seed, m + ms, first, dropped, BLOCK_N).to(g.dtype)
        acc = tl.dot(tl.trans(g), s, acc, input_precision=PRECISION)
        p_g += BLOCK_M * stride_gn.to(tl.int64)
        p_s += BLOCK_M * stride_sn
    acc *= tl.load(scaling_ptr + module)
    p_out = out_ptr + share.to(tl.int64) * size + start
    if DROPOUT:
        p_out += rs[None, :] * out + cols[:, None]
    else:
        p_out += cols[:, None] * rank + rs[None, :]
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_cols[:, None] & m_ranks[None, :])


@triton.jit
def total_kernel(shares_ptr, out_ptr, size, shares, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Out [size] = the sum over the first dimension of [shares, size]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ks = tl.arange(0, AT_ONCE)
    mask = at < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, shares, AT_ONCE):
        p = shares_ptr + (k + ks).to(tl.int64)[:, None] * size + at[None, :]
        some = tl.load(p, mask=(k + ks < shares)[:, None] & mask[None, :], other=0.0)
        acc += tl.sum(some, 0)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)
