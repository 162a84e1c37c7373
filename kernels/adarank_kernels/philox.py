"""Counter-based normal numbers: the same stream on every device, in any order, in any chunks.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 64-bit
key and a 128-bit counter into four 32-bit words. Element i of a tensor is word i % 4 of counter
i // 4, so any part of the stream can be made without the rest. Words become uniforms and, pair by
pair, normals (Box-Muller) exactly as in `triton.language.random`, so that a kernel which draws its
noise with `tl.randn4x(seed, i // 4)` sees the numbers of this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
# On the CPU a chunk's temporaries stay in the second-level cache and its operations below the size
# at which torch hands them to several threads: a barrier each would cost more than the work.
COUNTERS_PER_CHUNK = 1 << 14


def philox_words(seed: int, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox4x32-10 for each counter, as int64 in [0, 2**32).

    Args:
        seed: the key, 0 <= seed < 2**64.
        counters: int64, any shape, non-negative: the low 64 bits of the 128-bit counter.
    """
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    c0, c1 = counters & WORD, counters >> 32
    c2 = c3 = torch.zeros_like(counters)
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64: their 64 bits are those of the unsigned product. The
        # odd words keep what lies above their 32 bits: the mask after the exclusive or drops it.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_xor_(c1).bitwise_xor_(key0).bitwise_and_(WORD)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(key1).bitwise_and_(WORD)
        c1, c3 = product1, product0
        key0, key1 = (key0 + KEY_STEPS[0]) & WORD, (key1 + KEY_STEPS[1]) & WORD
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)


def uniform_from_words(words: Tensor) -> Tensor:
    """Float32 in [0, 1) from 32-bit words held as int64, as `tl.uint_to_uniform_float`."""
    signed = words.to(torch.int32)  # wraps: two's complement
    return (signed >> 31).bitwise_xor_(signed).to(torch.float32).mul_(4.6566127342e-10)


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    radius = first.clamp_min_(1e-7).log_().mul_(-2.0).sqrt_()
    angle = second.mul_(2.0 * math.pi)
    return torch.cos(angle).mul_(radius), angle.sin_().mul_(radius)


def philox_normal(
    shape: Sequence[int],
    seed: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Independent N(0, 1) numbers that depend on `seed` and the element's index, on nothing else.

    Args:
        shape: of the result; element i in row-major order is word i % 4 of counter i // 4.
        seed: the 64-bit Philox key, 0 <= seed < 2**64.
        device: where to make them; the words are the same bit for bit everywhere, the normals to
            the last digits of the device's logarithm, sine and cosine (about 1e-6).
        dtype: of the result; the numbers are made in float32 and rounded once.

    Returns:
        [*shape] tensor of `dtype`.

    Raises:
        ValueError: `seed` does not fit in 64 bits, or `shape` has a negative size.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape must have no negative size, got {tuple(shape)}")
    total = math.prod(shape)
    out = torch.empty((total + 3) // 4, 4, dtype=dtype, device=device)
    step = COUNTERS_PER_CHUNK if out.device.type == "cpu" else 256 * COUNTERS_PER_CHUNK
    for start in range(0, len(out), step):
        counters = torch.arange(start, min(start + step, len(out)), device=out.device)
        words = [uniform_from_words(word) for word in philox_words(seed, counters)]
        normals = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
        for word, values in enumerate(normals):
            out[start : start + step, word] = values
    return out.view(-1)[:total].view(tuple(shape))


def philox_normal_ref(
    shape: Sequence[int],
    seed: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`philox_normal` with Python integers and float64, a number at a time."""
    values: list[float] = []
    for counter in range((math.prod(shape) + 3) // 4):
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
        # A negative word x is folded to ~x; the result is in [0, 1).
        uniforms = [min(word, WORD - word) * 4.6566127342e-10 for word in c]
        for first, second in (uniforms[:2], uniforms[2:]):
            radius = math.sqrt(-2.0 * math.log(max(first, 1e-7)))
            values += [
                radius * math.cos(2 * math.pi * second),
                radius * math.sin(2 * math.pi * second),
            ]
    flat = torch.tensor(values[: math.prod(shape)], dtype=torch.float64, device=device)
    return flat.view(tuple(shape)).to(dtype)
