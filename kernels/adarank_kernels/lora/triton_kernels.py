"""Triton kernels of the grouped LoRA linear; `triton_launch.py` launches them.

Packed layout: A is [sum of padded ranks, in], each module's rows filled up to a multiple of 16 (S
is not read there, dS is zero), so every segment of S and dS [N, sum of padded ranks] starts
aligned. Up to four modules share a launch: their tensors come as separate pointers, so nothing is
copied to be launched together and outputs stay tensors of their own. Column tiles come from a table
of int32 rows, cached by shape.

    shrink    S = drop(X) A^T                 a pass over X for 64 columns (with dropout only)
    expand    Y_m += s_m S_m B_m^T            one launch; each tile loops over its own padded rank
    drop      out (+)= drop(in)               for the operands of the vendor's GEMMs
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep(seed, rows, k, dropped, BLOCK_K: tl.constexpr):
    """The mask of `dropout.keep_mask` for rows [M] and columns k + [0, BLOCK_K)."""
    c0 = (k // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)[None, :]
    c1 = rows.to(tl.uint32)[:, None]
    c0, c1 = tl.broadcast(c0, c1)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c0 * 0, c0 * 0)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    halves = tl.interleave(words & 0xFFFF, words >> 16)
    return halves.to(tl.int32) >= dropped


@triton.jit
def shrink_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    seed_ptr,
    N,
    K,
    R,
    stride_xn,
    dropped,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S = drop(X) A^T: X [N, K], A [R, K], S [N, R], all row by row. Accumulates in float32."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    p_x = x_ptr + rows.to(tl.int64)[:, None] * stride_xn + ks[None, :]
    p_a = a_ptr + cols[None, :] * K + ks[:, None]
    m_rows, m_cols = rows[:, None] < N, cols[None, :] < R
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(p_x, mask=m_rows, other=0.0)
            a = tl.load(p_a, mask=m_cols, other=0.0)
        else:
            x = tl.load(p_x, mask=m_rows & (k + ks[None, :] < K), other=0.0)
            a = tl.load(p_a, mask=m_cols & (k + ks[:, None] < K), other=0.0)
        if DROPOUT:
            x = x * keep(seed, rows, k, dropped, BLOCK_K).to(x.dtype)
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
        p_x += BLOCK_K
        p_a += BLOCK_K
    p_s = s_ptr + rows.to(tl.int64)[:, None] * R + cols[None, :]
    tl.store(p_s, acc.to(s_ptr.dtype.element_ty), mask=m_rows & m_cols)


@triton.jit
def slot(module, p0, p1, p2, p3):
    """The pointer of a module of the launch; each starts at 16 bytes (the host sees to it)."""
    pointer = p0
    if module == 1:
        pointer = p1
    if module == 2:
        pointer = p2
    if module == 3:
        pointer = p3
    return tl.multiple_of(pointer, 16)


@triton.jit
def expand_kernel(
    s_ptr,
    y0,
    y1,
    y2,
    y3,
    b0,
    b1,
    b2,
    b3,
    scaling_ptr,
    table_ptr,
    N,
    stride_sn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Y_m += s_m S_m B_m^T in place, for up to four modules; a row of `table_ptr` a tile of one."""
    entry = table_ptr + tl.program_id(1) * 8
    module = tl.load(entry)
    s_offset = tl.multiple_of(tl.load(entry + 1), 16)
    rank = tl.load(entry + 2)
    padded = tl.multiple_of(tl.load(entry + 3), 16)
    first = tl.multiple_of(tl.load(entry + 4), 16)
    out = tl.load(entry + 5)
    if ALIGNED:
        out = tl.multiple_of(out, 16)
    y_ptr, b_ptr = slot(module, y0, y1, y2, y3), slot(module, b0, b1, b2, b3)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = first + tl.arange(0, BLOCK_N)
    rs = tl.arange(0, BLOCK_R)
    m_rows, m_cols = rows[:, None] < N, cols[None, :] < out
    p_s = s_ptr + rows.to(tl.int64)[:, None] * stride_sn + s_offset + rs[None, :]
    p_b = b_ptr + cols[None, :] * rank + rs[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, padded, BLOCK_R):
        s = tl.load(p_s + r, mask=m_rows & (r + rs[None, :] < rank), other=0.0)
        b = tl.load(p_b + r, mask=m_cols & (r + rs[:, None] < rank), other=0.0)
        acc = tl.dot(s, b.to(s.dtype), acc, input_precision=PRECISION)
    p_y = y_ptr + rows.to(tl.int64)[:, None] * out + cols[None, :]
    mask = m_rows & m_cols
    y = tl.load(p_y, mask=mask, other=0.0).to(tl.float32) + acc * tl.load(scaling_ptr + module)
    tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def drop_kernel(
    x_ptr,
    out_ptr,
    seed_ptr,
    N,
    K,
    stride_xn,
    dropped,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr,
):
    """Out [N, K] = drop(X), or with ADD += drop(X)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K
    cols = k + tl.arange(0, BLOCK_K)
    mask = (rows[:, None] < N) & (cols[None, :] < K)
    x = tl.load(
        x_ptr + rows.to(tl.int64)[:, None] * stride_xn + cols[None, :], mask=mask, other=0.0
    )
    x = x * keep(tl.load(seed_ptr), rows, k, dropped, BLOCK_K).to(x.dtype)
    p_out = out_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :]
    if ADD:
        x = x.to(tl.float32) + tl.load(p_out, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out, x.to(out_ptr.dtype.element_ty), mask=mask)
