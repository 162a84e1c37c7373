"""Dropout masks that are a function of a seed: made again in backward, so never stored.

Element (row, column) is kept if its 16-bit number is at least dropout * 65536. The number is half
word column % 8 (low half of word 0, high half of word 0, low half of word 1, ...) of Philox4x32-10
with key = seed and counter = (column // 8, row, 0, 0). The Triton kernels draw the same bits; one
counter covers the eight elements of a 16-byte bf16 load.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS_PER_COUNTER = 8
LEVELS = 1 << 16  # dropout is rounded to a multiple of 1 / LEVELS
_WORD = 0xFFFFFFFF
_ROWS_PER_CHUNK = 256  # keeps the int64 temporaries of a chunk in the second-level cache


def draw_seed(device: torch.device) -> Tensor:
    """An int64 seed [1] from torch's generator of `device`, without a host synchronisation."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(dropout: float) -> int:
    """Half words below this are dropped."""
    return min(round(dropout * LEVELS), LEVELS)


def keep_scale(dropout: float) -> float:
    """What kept elements are multiplied with, 1 / (1 - dropout), for the dropout really applied."""
    dropped = threshold(dropout)
    return LEVELS / (LEVELS - dropped) if dropped < LEVELS else 0.0


def philox_words(key: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox4x32-10 for counters (c0, c1, 0, 0), as int64 in [0, 2**32).

    Args:
        key: int64 tensor, broadcast against the counters; its 64 bits are the key.
        c0, c1: int64 tensors in [0, 2**32), broadcast against each other.
    """
    key0, key1 = key & _WORD, (key >> 32) & _WORD
    c2 = c3 = torch.zeros_like(key0)
    for _ in range(10):
        # int64 products wrap modulo 2**64: their 64 bits are those of the unsigned product.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((product1 >> 32) & _WORD) ^ c1 ^ key0
        c2 = ((product0 >> 32) & _WORD) ^ c3 ^ key1
        c1, c3 = product1 & _WORD, product0 & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _keep_rows(seed: Tensor, start: int, stop: int, columns: int, dropped: int) -> Tensor:
    groups = (columns + COLUMNS_PER_COUNTER - 1) // COLUMNS_PER_COUNTER
    row = torch.arange(start, stop, device=seed.device).unsqueeze(1)
    words = philox_words(seed, torch.arange(groups, device=seed.device), row)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (halves >= dropped).flatten(1)[:, :columns]


def keep_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """Bool [rows, columns]: True where an element survives dropout.

    Args:
        seed: int64 tensor with one element; the mask lives on its device.
        rows, columns: of the masked matrix.
        dropout: probability of False, in [0, 1].
    """
    seed = seed.reshape(1)
    dropped = threshold(dropout)
    if torch.compiler.is_compiling() or rows <= _ROWS_PER_CHUNK or seed.device.type != "cpu":
        return _keep_rows(seed, 0, rows, columns, dropped)
    mask = torch.empty(rows, columns, dtype=torch.bool)
    for start in range(0, rows, _ROWS_PER_CHUNK):
        stop = min(start + _ROWS_PER_CHUNK, rows)
        mask[start:stop] = _keep_rows(seed, start, stop, columns, dropped)
    return mask
