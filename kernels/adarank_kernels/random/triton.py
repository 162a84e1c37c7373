"""The Triton form of `philox_normal`: a buffer filled in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adarank_kernels.runtime.registry import on_device

FILL = {"BLOCK": 512, "num_warps": 4, "num_stages": 1}  # counters, four numbers each, a program


@triton.jit
def fill_kernel(out_ptr, key_ptr, total, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i], i < total: the normal, or (WORDS) the 32-bit word, of index i under the key."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    counter = first + tl.arange(0, BLOCK)
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    v0, v1, v2, v3 = tl.philox(tl.load(key_ptr), c0, c1, c0 * 0, c0 * 0)
    if not WORDS:
        u0, u1 = tl.uint_to_uniform_float(v0), tl.uint_to_uniform_float(v1)
        u2, u3 = tl.uint_to_uniform_float(v2), tl.uint_to_uniform_float(v3)
        v0, v1 = tl.pair_uniform_to_normal(u0, u1)
        v2, v3 = tl.pair_uniform_to_normal(u2, u3)
    values = tl.interleave(tl.interleave(v0, v2), tl.interleave(v1, v3))
    index = tl.arange(0, 4 * BLOCK)
    element = out_ptr.dtype.element_ty
    if WORDS:
        values = values.to(element, bitcast=True)
    else:
        values = values.to(element)
    tl.store(out_ptr + first * 4 + index, values, mask=first * 4 + index < total)


def fill(out: Tensor, key: Tensor, words: bool = False) -> Tensor:
    """Fill the contiguous `out` with normals, or with words if it is int32 and `words`."""
    assert out.is_contiguous() and (out.dtype == torch.int32) == words
    grid = (triton.cdiv(out.numel(), 4 * FILL["BLOCK"]),)
    with on_device(out.device):
        fill_kernel[grid](out, key, out.numel(), WORDS=words, **FILL)
    return out
