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

from adarank_kernels.errors import AdarankError
from adarank_kernels.random.reference import philox_normal_ref
from adarank_kernels.random.words import WORD, key_tensor, philox_words, uniform_from_words
from adarank_kernels.runtime.native import operators
from adarank_kernels.runtime.registry import DTYPES, HAS_TRITON, check_close, ready, register

if HAS_TRITON:
    from adarank_kernels.random import triton

# Calls for fewer numbers do not wait for the C++ operators to be built.
WORTH_BUILDING = 1 << 16
COUNTERS_PER_CHUNK = 1 << 15  # on the CPU: temporaries stay in the second-level cache
COUNTERS_ELSEWHERE = 1 << 23


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
        AdarankError: `seed` does not fit in 64 bits, or `shape` has a negative size.
    """
    if not 0 <= seed < 2**64:
        raise AdarankError(f"seed must be in [0, 2**64), got {seed}")
    if any(size < 0 for size in shape):
        raise AdarankError(f"shape must have no negative size, got {tuple(shape)}")
    total = math.prod(shape)
    out = torch.empty((total + 3) // 4, 4, dtype=dtype, device=device)
    # Drawn in float32 whatever `dtype`: the registry's float32 rule is about products.
    if total and dtype != torch.float64 and ready("philox_normal", out.device, DTYPES[0]):
        triton.fill(out, key_tensor(seed, out.device))
    else:
        fill_in_torch(out, seed)
    return out.view(-1)[:total].view(tuple(shape))


def fill_in_torch(out: Tensor, seed: int) -> None:
    """Normals into `out` [counters, 4], in torch."""
    on_cpu = out.device.type == "cpu"
    native = on_cpu and out.numel() >= WORTH_BUILDING and operators() is not None
    key = key_tensor(seed, out.device)
    step = COUNTERS_PER_CHUNK if on_cpu else COUNTERS_ELSEWHERE
    for start in range(0, len(out), step):
        part = out[start : start + step]
        _box_muller(words_of(key, start, len(part), native), part)


def words_of(key: Tensor, first: int, count: int, native: bool) -> Tensor:
    """The words of `count` counters from `first` on: int32 [4, count]; `native`: made in C++."""
    if native:
        words: Tensor = torch.ops.adarank.philox(int(key), first, 0, 1, count)
        return words[:, 0]
    counters = torch.arange(first, first + count, device=key.device)
    return torch.stack(philox_words(key, counters & WORD, counters >> 32))


def _check_kernel(device: torch.device) -> None:
    """Words bit for bit, normals as near to float64 as torch's."""
    seed, total = 2**63 + 12345, 8197
    key = key_tensor(seed, device)
    counters = torch.arange((total + 3) // 4, device=device)
    expected = torch.stack(philox_words(key, counters, counters * 0), 1).view(-1)[:total]
    words = torch.empty(total, dtype=torch.int32, device=device)
    if not torch.equal(triton.fill(words, key, words=True), expected):
        raise ArithmeticError("the words differ from torch's")
    torchs = torch.empty(len(counters), 4, device=device)
    fill_in_torch(torchs, seed)
    ours = triton.fill(torch.empty(total, device=device), key)
    exact = philox_normal_ref((total,), seed, device, torch.float64)
    check_close(ours, torchs.view(-1)[:total], exact)


if HAS_TRITON:
    register("philox_normal", _check_kernel)
