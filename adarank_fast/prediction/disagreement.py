"""How far variants are from the clean pass: per item, summed over the positions that count."""

from __future__ import annotations

from typing import TypedDict, cast

import torch
from torch import Tensor, nn

from adarank_kernels.disagreement.op import pairwise_disagreement


def disagreement_sums(
    outputs: Tensor,
    reference: Tensor,
    mask: Tensor | None,
    metric: str = "l1",
    head: nn.Module | None = None,
) -> Tensor:
    """Per variant and item, the disagreement with the reference summed over positions.

    Args:
        outputs: [K, B, ..., V], or hidden states [K, B, ..., D] if there is a head.
        reference: [B, ..., V] or [B, ..., D].
        mask: [B, T], non-zero where a position counts; used if the reference is [B, T, ..., V].
        metric: see `adarank_kernels.pairwise_disagreement`.
        head: the Linear that makes outputs of hidden states; they are never formed as a whole.

    Returns:
        [K, B] float64.
    """
    K, B = outputs.shape[:2]
    counted = flat_mask(mask, reference)
    if counted is not None and not counted.any():
        return torch.zeros(K, B, dtype=torch.float64, device=outputs.device)
    values = pairwise_disagreement(
        outputs.flatten(1, -2),
        **as_head(head),
        metric=metric,
        mask=None if counted is None or counted.all() else counted,
        reference=reference.flatten(0, -2),
        reduction="none",
    )
    return values.view(K, B, -1).sum(-1)


class Head(TypedDict, total=False):
    """Keywords of `pairwise_disagreement`: weight [V, D] and bias [V] of a linear head."""

    weight: Tensor
    bias: Tensor | None


def as_head(head: nn.Module | None) -> Head:
    """The keywords of `pairwise_disagreement` for outputs, or for hidden states under a head."""
    return {} if head is None else cast("Head", {"weight": head.weight, "bias": head.bias})


def flat_mask(mask: Tensor | None, reference: Tensor) -> Tensor | None:
    """Bool over the positions of [B, ..., V], flattened: True where one counts; None if all do.

    A mask [B, T] speaks about [B, T, ..., V] outputs and about no others.
    """
    if mask is None or reference.dim() < 3 or reference.shape[:2] != mask.shape:
        return None
    inner = [1] * (reference.dim() - 3)
    return (mask != 0).view(*mask.shape, *inner).expand(reference.shape[:-1]).flatten()


def positions(reference: Tensor, mask: Tensor | None) -> int:
    """How many positions `disagreement_sums` adds up over all items of [B, ..., V]."""
    counted = flat_mask(mask, reference)
    return reference[..., 0].numel() if counted is None else int(counted.sum())
