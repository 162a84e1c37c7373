"""How far apart two outputs are, position by position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def _l1(f: Tensor, g: Tensor) -> Tensor:
    return (f - g).abs_().mean(-1, dtype=torch.float64)


# The others in float64: small divergences are differences of nearly equal numbers.


def _tv(f: Tensor, g: Tensor) -> Tensor:
    return (f.double().softmax(-1) - g.double().softmax(-1)).abs_().sum(-1) / 2


def _kl(f: Tensor, g: Tensor) -> Tensor:
    """KL(softmax f || softmax g) in nats; a class that f rules out adds nothing."""
    log_p, log_q = f.double().log_softmax(-1), g.double().log_softmax(-1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def _js(f: Tensor, g: Tensor) -> Tensor:
    p, q = f.double().softmax(-1), g.double().softmax(-1)
    entropy = torch.special.entr
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).sum(-1)


def _argmax(f: Tensor, g: Tensor) -> Tensor:
    return (f.argmax(-1) != g.argmax(-1)).double()


METRICS: dict[str, Distance] = {"l1": _l1, "tv": _tv, "kl": _kl, "js": _js, "argmax": _argmax}


def check_metric(metric: str) -> Distance:
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is unknown; use one of {', '.join(METRICS)}")
    return METRICS[metric]


def disagreement_sums(
    outputs: Tensor, reference: Tensor, mask: Tensor | None, metric: str = "l1"
) -> Tensor:
    """Per variant and item, the disagreement with the reference summed over positions.

    `l1` is the mean over features of |f - g|; `tv` half the sum over classes of |p - q|,
    p = softmax(f); `kl` KL(p || q) and `js` Jensen-Shannon in nats; `argmax` 1 where the largest
    outputs differ (the lowest index on ties).

    Args:
        outputs: [K, B, ..., V].
        reference: [B, ..., V].
        mask: [B, T], non-zero where a position counts; used if the reference is [B, T, ..., V].

    Returns:
        [K, B] float64.
    """
    distance = check_metric(metric)
    values = torch.stack([distance(variant, reference) for variant in outputs])  # [K, B, ...]
    if applies(mask, reference):
        assert mask is not None
        values = values * (mask != 0).view(*mask.shape, *[1] * (values.dim() - 3))
    return values.flatten(2).sum(-1) if values.dim() > 2 else values


def positions(reference: Tensor, mask: Tensor | None) -> int:
    """How many positions `disagreement_sums` adds up over all items of [B, ..., V]."""
    if applies(mask, reference):
        assert mask is not None
        per_position = reference[0, 0, ..., 0].numel()
        return int((mask != 0).sum()) * per_position
    return reference[..., 0].numel()


def applies(mask: Tensor | None, reference: Tensor) -> bool:
    """A mask [B, T] speaks about [B, T, ..., V] outputs and about no others."""
    return mask is not None and reference.dim() >= 3 and reference.shape[:2] == mask.shape
