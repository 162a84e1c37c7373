"""Dropout masks that are a function of a seed: made again in backward, so never stored.

Where the host takes longer than the device, the mask itself is drawn and kept (`draw_mask`).

Element (row, column) is kept if its 16-bit number is at least dropout * 65536. The number is half
word column % 8 (low half of word 0, high half of word 0, low half of word 1, ...) of Philox4x32-10
with key = seed and counter = (column // 8, row, 0, 0). The Triton kernels draw the same bits; one
counter covers the eight elements of a 16-byte bf16 load.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adarank_kernels.random.words import philox_words
from adarank_kernels.runtime.native import is_loaded

COLUMNS_PER_COUNTER = 8


LEVELS = 1 << 16  # dropout is rounded to a multiple of 1 / LEVELS


_ROWS_PER_CHUNK = 256  # keeps the int64 temporaries of a chunk in the second-level cache


def draw_seed(device: torch.device) -> Tensor:
    """An int64 seed [1] from torch's generator of `device`, without a host synchronisation."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def draw_mask(X: Tensor, keep: float) -> Tensor:
    """The mask itself, [N, in] like X, 0 or 1, from torch's generator: one launch.

    Args:
        X: [N, in].
        keep: the probability of a 1, `keep_probability(dropout)`.
    """
    return torch.empty_like(X, memory_format=torch.contiguous_format).bernoulli_(keep)


def keep_probability(dropout: float) -> float:
    """Of an element, for the dropout really applied."""
    return (LEVELS - threshold(dropout)) / LEVELS


def is_mask(seed: Tensor | None) -> bool:
    """Whether it is no seed, but what `draw_mask` drew."""
    return seed is not None and seed.dtype is not torch.int64


def threshold(dropout: float) -> int:
    """Half words below this are dropped."""
    return min(round(dropout * LEVELS), LEVELS)


def keep_scale(dropout: float) -> float:
    """What kept elements are multiplied with, 1 / (1 - dropout), for the dropout really applied."""
    dropped = threshold(dropout)
    return LEVELS / (LEVELS - dropped) if dropped < LEVELS else 0.0


def _keep_rows(seed: Tensor, start: int, stop: int, columns: int, dropped: int) -> Tensor:
    groups = (columns + COLUMNS_PER_COUNTER - 1) // COLUMNS_PER_COUNTER
    row = torch.arange(start, stop, device=seed.device).unsqueeze(1)
    words = philox_words(seed, torch.arange(groups, device=seed.device), row)
    return _compare(torch.stack(words, dim=-1), dropped)[:, :columns]


def _compare(words: Tensor, dropped: int) -> Tensor:
    """[rows, groups, 4] int32 -> [rows, 8 * groups] bool: half words of at least `dropped`."""
    halves = words.bitwise_xor_(-0x7FFF8000).view(torch.int16)  # flips both upper bits: now signed
    return (halves > dropped - 0x8001).flatten(1)


def keep_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """Bool [rows, columns]: True where an element survives dropout.

    Args:
        seed: int64 tensor with one element; the mask lives on its device.
        rows: of the masked matrix.
        columns: of the masked matrix.
        dropout: probability of False, in [0, 1].
    """
    seed = seed.reshape(1)
    dropped = threshold(dropout)
    if dropped in (0, LEVELS):
        return torch.full((rows, columns), dropped == 0, device=seed.device)
    if torch.compiler.is_compiling() or type(seed) is not Tensor or seed.device.type != "cpu":
        return _keep_rows(seed, 0, rows, columns, dropped)
    groups = -(-columns // COLUMNS_PER_COUNTER)
    native = is_loaded()
    key = int(seed)
    mask = torch.empty(rows, columns, dtype=torch.bool)
    for start in range(0, rows, _ROWS_PER_CHUNK):
        stop = min(start + _ROWS_PER_CHUNK, rows)
        if not native:
            mask[start:stop] = _keep_rows(seed, start, stop, columns, dropped)
        else:
            words = torch.ops.adarank.philox(key, 0, start, stop - start, groups)
            mask[start:stop] = _compare(words.movedim(0, -1).contiguous(), dropped)[:, :columns]
    return mask
