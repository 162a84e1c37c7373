"""`philox_normal` in Python integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adarank_kernels.random.words import KEY_STEPS, MULTIPLIERS, ROUNDS, WORD


def philox_words_ref(seed: int, counter: int) -> list[int]:
    """The four words of one counter of 64 bits, each in [0, 2**32)."""
    c = [counter & WORD, counter >> 32, 0, 0]
    key = [seed & WORD, seed >> 32]
    for _ in range(ROUNDS):
        product0, product1 = c[0] * MULTIPLIERS[0], c[2] * MULTIPLIERS[1]
        c = [
            (product1 >> 32) ^ c[1] ^ key[0],
            product1 & WORD,
            (product0 >> 32) ^ c[3] ^ key[1],
            product0 & WORD,
        ]
        key = [(key[0] + KEY_STEPS[0]) & WORD, (key[1] + KEY_STEPS[1]) & WORD]
    return c


def philox_normal_ref(
    shape: Sequence[int],
    seed: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`philox_normal` with Python integers and float64, a number at a time."""
    values: list[float] = []
    for counter in range((math.prod(shape) + 3) // 4):
        # A negative word x is folded to ~x; the result is in [0, 1).
        words = philox_words_ref(seed, counter)
        uniforms = [min(word, WORD - word) * 4.6566127342e-10 for word in words]
        for first, second in (uniforms[:2], uniforms[2:]):
            radius = math.sqrt(-2.0 * math.log(max(first, 1e-7)))
            values += [radius * f(2 * math.pi * second) for f in (math.cos, math.sin)]
    flat = torch.tensor(values[: math.prod(shape)], dtype=torch.float64, device=device)
    return flat.view(tuple(shape)).to(dtype)
