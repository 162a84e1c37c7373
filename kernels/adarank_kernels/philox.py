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

from adarank_kernels import _native
from adarank_kernels._triton import DTYPES, HAS_TRITON, check_close, ready, register

if HAS_TRITON:
    from adarank_kernels import _philox_kernels

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
COUNTERS_PER_CHUNK = 1 << 15  # on the CPU: temporaries stay in the second-level cache


def philox_words(key: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox4x32-10 for counters (c0, c1, 0, 0), as int32.

    Args:
        key: int64 tensor [1]; its 64 bits are the key (in a tensor, so that a seed drawn on a
            device stays there).
        c0, c1: int64 tensors in [0, 2**32), broadcast against each other. The first rounds run on
            the unbroadcast sizes.
    """
    step = torch.arange(ROUNDS, device=key.device)
    keys0 = ((key & WORD) + step * KEY_STEPS[0]) & WORD
    keys1 = ((key >> 32 & WORD) + step * KEY_STEPS[1]) & WORD
    c2 = c3 = torch.zeros_like(key)
    for key0, key1 in zip(keys0.unbind(), keys1.unbind(), strict=True):
        # int64 products wrap modulo 2**64: their 64 bits are those of the unsigned product. The
        # odd words keep what lies above their 32 bits: the mask after the exclusive or drops it.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = _mix(product1, c1, key0), _mix(product0, c3, key1)
        c1, c3 = product1, product0
    w0, w1, w2, w3 = (word.to(torch.int32) for word in (c0, c1, c2, c3))  # wraps
    return w0, w1, w2, w3


def _mix(product: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """The product's upper half, exclusive or `word` and `key`, below 2**32."""
    mixed = (product >> 32).bitwise_xor_(key)
    mixed = mixed.bitwise_xor_(word) if mixed.shape == word.shape else mixed ^ word
    return mixed.bitwise_and_(WORD)


def key_tensor(seed: int, device: torch.device) -> Tensor:
    """A 64-bit key as int64 [1], two's complement."""
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, device=device)


def uniform_from_words(words: Tensor) -> Tensor:
    """Float32 in [0, 1) from int32 words, as `tl.uint_to_uniform_float`."""
    return (words >> 31).bitwise_xor_(words).to(torch.float32).mul_(4.6566127342e-10)


def _box_muller(words: Tensor, out: Tensor) -> None:
    """Normals [n, 4] from words [4, n]: two from the first two, two from the others."""
    radius = uniform_from_words(words[0::2]).clamp_min_(1e-7).log_().mul_(-2.0).sqrt_()
    angle = uniform_from_words(words[1::2]).mul_(2.0 * math.pi)
    out[:, 0::2].t().copy_(torch.cos(angle).mul_(radius))
    out[:, 1::2].t().copy_(angle.sin_().mul_(radius))


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
    # Drawn in float32 whatever `dtype`: the registry's float32 rule is about products.
    if total and dtype != torch.float64 and ready("philox_normal", out.device, DTYPES[0]):
        _philox_kernels.fill(out, key_tensor(seed, out.device))
    else:
        _fill(out, seed)
    return out.view(-1)[:total].view(tuple(shape))


def _fill(out: Tensor, seed: int) -> None:
    """Normals into `out` [counters, 4], in torch."""
    on_cpu = out.device.type == "cpu"
    native = _native.for_call(out.numel()) if on_cpu else None
    key = key_tensor(seed, out.device)
    step = COUNTERS_PER_CHUNK if on_cpu else 256 * COUNTERS_PER_CHUNK
    for start in range(0, len(out), step):
        part = out[start : start + step]
        if native is not None:
            words = _native.words(native, seed, start, 0, 1, len(part))[:, 0]
        else:
            counters = torch.arange(start, start + len(part), device=out.device)
            words = torch.stack(philox_words(key, counters & WORD, counters >> 32))
        _box_muller(words, part)


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


def _check_kernel(device: torch.device) -> None:
    """Words bit for bit, normals as near to float64 as torch's."""
    seed, total = 2**63 + 12345, 8197
    key = key_tensor(seed, device)
    counters = torch.arange((total + 3) // 4, device=device)
    expected = torch.stack(philox_words(key, counters, counters * 0), 1).view(-1)[:total]
    words = torch.empty(total, dtype=torch.int32, device=device)
    if not torch.equal(_philox_kernels.fill(words, key, words=True), expected):
        raise ArithmeticError("the words differ from torch's")
    torchs = torch.empty(len(counters), 4, device=device)
    _fill(torchs, seed)
    ours = _philox_kernels.fill(torch.empty(total, device=device), key)
    exact = philox_normal_ref((total,), seed, device, torch.float64)
    check_close(ours, torchs.view(-1)[:total], exact)


if HAS_TRITON:
    register("philox_normal", _check_kernel)
