"""`pairwise_disagreement` in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adarank_kernels.disagreement.op import check, kept_tokens


def pairwise_disagreement_ref(
    hidden: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    metric: str = "l1",
    mask: Tensor | None = None,
    reference: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`pairwise_disagreement` in plain torch: all outputs in hidden's dtype, a pair at a time."""

    def outputs(rows: Tensor) -> Tensor:
        f = rows if weight is None else F.linear(rows, weight.to(rows), None)
        return f if bias is None else f + bias.to(f)

    def distance(f: Tensor, g: Tensor) -> Tensor:
        p, q, log_p, log_q = f.softmax(-1), g.softmax(-1), f.log_softmax(-1), g.log_softmax(-1)
        if metric == "l1":
            return torch.where(f == g, 0, (f - g).abs()).double().mean(-1)
        if metric == "tv":
            return (p - q).abs().double().sum(-1) / 2
        if metric == "kl":
            return torch.where(p == 0, 0, p * (log_p - log_q)).double().sum(-1)
        if metric == "js":
            entropy = torch.special.entr
            found: Tensor = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
            return found.double().sum(-1)
        differ = (f.argmax(-1) != g.argmax(-1)).double()
        return differ.masked_fill(f.isnan().any(-1) | g.isnan().any(-1), torch.nan)

    def reduced(values: Tensor) -> Tensor:
        if reduction == "none":
            return values if mask is None else values.where(mask != 0, 0)
        values = values if kept is None else values[kept]
        total = values.mean() if reduction == "mean" else values.sum()
        return total if hidden.dtype == torch.float64 else total.float()

    check(hidden, weight, bias, metric, mask, reference, reduction)
    kept = None if mask is None else kept_tokens(mask)
    f = [outputs(rows) for rows in hidden]
    if reference is not None:
        g = outputs(reference)
        return torch.stack([reduced(distance(rows, g)) for rows in f])
    return torch.stack([torch.stack([reduced(distance(a, b)) for b in f]) for a in f])
