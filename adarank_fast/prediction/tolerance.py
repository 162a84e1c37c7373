"""Whether tensors that should hold the same numbers do, up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adarank_fast.models.batches import repeat

NARROW = 3e-2  # what 16-bit numbers that should be the same may differ by, as a share of their norm


def is_same(two: Tensor, one: Tensor, within: float = 1e-3) -> bool:
    """True if the tensors agree up to rounding: `within` of the norm, 16-bit ones more loosely."""
    if two.shape != one.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(two, one)
    tolerance = within if two.element_size() >= 4 else max(within, NARROW)
    one, two = one.double().nan_to_num(), two.double().nan_to_num()
    return bool((two - one).norm() <= tolerance * one.norm() + 1e-12)


def is_twice(two: Tensor, one: Tensor, within: float = 1e-3) -> bool:
    """True if `two` is `one` on top of `one`, up to rounding."""
    if not one.dim() or two.shape[0] != 2 * one.shape[0]:
        return False
    return is_same(two, repeat(one, 2), within)


def rounding(model: nn.Module) -> float:
    """How far outputs that should be the same may differ, as a share of their norm.

    The outputs' own type does not tell: those of a 16-bit model may be read in float32.
    """
    sizes = [p.element_size() for p in model.parameters() if p.is_floating_point()]
    return NARROW if min(sizes, default=4) < 4 else 1e-3
