"""How far variants are from the clean pass: per item, summed over the positions that count."""

from __future__ import annotations

from typing import cast

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
    if applies(mask, reference):
        mask = (cast(Tensor, mask) != 0).view(*reference.shape[:2], *[1] * (reference.dim() - 3))
        mask = mask.expand(reference.shape[:-1]).flatten()
        if not mask.any():
            return torch.zeros(K, B, dtype=torch.float64, device=outputs.device)
        mask = None if mask.all() else mask
    else:
        mask = None
    values = pairwise_disagreement(
        outputs.flatten(1, -2),
        weight=None if head is None else cast(Tensor, head.weight),
        bias=None if head is None else cast("Tensor | None", head.bias),
        metric=metric,
        mask=mask,
        reference=reference.flatten(0, -2),
        reduction="none",
    )
    return values.view(K, B, -1).sum(-1)


def positions(reference: Tensor, mask: Tensor | None) -> int:
    """How many positions `disagreement_sums` adds up over all items of [B, ..., V]."""
    if applies(mask, reference):
        per_position = reference[0, 0, ..., 0].numel()
        return int((cast(Tensor, mask) != 0).sum()) * per_position
    return reference[..., 0].numel()


def applies(mask: Tensor | None, reference: Tensor) -> bool:
    """A mask [B, T] speaks about [B, T, ..., V] outputs and about no others."""
    return mask is not None and reference.dim() >= 3 and reference.shape[:2] == mask.shape
