"""Philox4x32-10 words and keys in torch: what every form of the generator agrees on."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox_words(key: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox4x32-10 for counters (c0, c1, 0, 0), as int32.

    Args:
        key: int64 tensor [1]; its 64 bits are the key (in a tensor, so that a seed drawn on a
            device stays there).
        c0: int64 tensor in [0, 2**32).
        c1: likewise; broadcast against `c0`. The first rounds run on the unbroadcast sizes.
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
    """(upper half of the product) XOR `word` XOR `key`, below 2**32."""
    mixed = (product >> 32).bitwise_xor_(key)
    mixed = mixed.bitwise_xor_(word) if mixed.shape == word.shape else mixed ^ word
    return mixed.bitwise_and_(WORD)


def key_tensor(seed: int, device: torch.device) -> Tensor:
    """A 64-bit key as int64 [1], two's complement."""
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, device=device)


def uniform_from_words(words: Tensor) -> Tensor:
    """Float32 in [0, 1) from int32 words, as `tl.uint_to_uniform_float`."""
    return (words >> 31).bitwise_xor_(words).to(torch.float32).mul_(4.6566127342e-10)
