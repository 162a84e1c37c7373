"""Philox words on the CPU in twenty lines of C, built on first use; without it, the torch form.

torch has no 32 x 32 -> 64-bit product: its int64 operations take 10 ns a word and more on one core,
a C compiler's vector loop 2 ns. The words are the same bit for bit, and the torch form remains the
definition. torch.compile was tried: 4 ns a normal, but 27 s to build and 7 s to load in each later
process, more than the drawing takes. This builds in 0.3 s, once a process.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from adarank_kernels.runtime.native import build

# Calls for fewer numbers do not start the build. It pays from some ten million numbers in a process
# (the smallest encoder's attention modules take 18 million in five trials), drawn in larger calls.
WORTH_BUILDING = 1 << 16

SOURCE = r"""
#include <stdint.h>

void words(uint64_t key, uint64_t first, int64_t rows, int64_t n, uint32_t *restrict out) {
    int64_t plane = rows * n;
    for (int64_t row = 0; row < rows; row++, out += n)
        for (int64_t i = 0; i < n; i++) {
            uint64_t counter = first + ((uint64_t)row << 32) + (uint64_t)i;
            uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
            uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
            for (int round = 0; round < 10; round++) {
                uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
                c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
                c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
                k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
            }
            out[i] = c0, out[i + plane] = c1, out[i + 2 * plane] = c2, out[i + 3 * plane] = c3;
        }
}
"""


@functools.cache
def library() -> ctypes.CDLL | None:
    """`SOURCE`'s function, or None where it cannot be built."""
    loaded = build("philox", SOURCE)
    if loaded is None:
        return None
    u64, i64 = ctypes.c_uint64, ctypes.c_int64
    loaded.words.argtypes = (u64, u64, i64, i64, ctypes.c_void_p)
    loaded.words.restype = None
    return loaded


def for_call(count: int) -> ctypes.CDLL | None:
    """The library, if a call for `count` numbers is large enough to want it and it can be built."""
    return library() if count >= WORTH_BUILDING else None


def words(loaded: ctypes.CDLL, key: int, c0: int, c1: int, rows: int, n: int) -> Tensor:
    """int32 [4, rows, n]: `philox_words` of counters (c0 + i, c1 + row); c0 carries into c1."""
    out = torch.empty(4, rows, n, dtype=torch.int32)
    loaded.words(key % 2**64, c0 + (c1 << 32), rows, n, out.data_ptr())
    return out
