"""The yardstick of the disagreement: all outputs of all variants, then a pair at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def materialised(hidden: Tensor, weight: Tensor, metric: str) -> Tensor:
    """[K, K] by way of [K, N, V] in hidden's dtype; "l1" or "tv"."""
    outputs = torch.nn.functional.linear(hidden, weight)
    if metric == "tv":
        for rows in outputs:  # in place: a second [K, N, V] would be unfair
            torch.softmax(rows, -1, out=rows)
    found = torch.zeros(len(hidden), len(hidden), device=hidden.device)
    for i in range(len(hidden)):
        for j in range(i):
            sums = (outputs[i] - outputs[j]).abs_().sum(-1, dtype=torch.float32)
            value = sums.mean() / (len(weight) if metric == "l1" else 2)
            found[i, j] = found[j, i] = value
    return found
