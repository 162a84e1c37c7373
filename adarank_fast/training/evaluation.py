"""Losses and predictions of a model on held-out items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn

from adarank_fast.training.tokens import IGNORED, Item, collate, item_length


@dataclass(frozen=True)
class Evaluation:
    """What a model says about held-out items.

    Attributes:
        losses: [N] float64: each item's summed loss in nats.
        counts: [N] int64: labels that each loss is a sum over (1 for classification).
        predictions: [N, C] float32 logits for classification; for a language model [M] int64, the
            likeliest token at each of the M = sum(counts) positions.
        labels: [N] or [M] int64.
    """

    losses: numpy.ndarray
    counts: numpy.ndarray
    predictions: numpy.ndarray
    labels: numpy.ndarray


def evaluate(model: nn.Module, items: Sequence[Item], pad: int, batch_size: int = 64) -> Evaluation:
    """Losses and predictions of every item, in the order of `items`.

    A label that is a list marks a language model: position t is held against label t + 1.
    """
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(items)), key=lambda index: item_length(items[index]))
    found: list[Any] = [None] * len(items)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([items[index] for index in chosen], pad)
            batch = {key: value.to(device) for key, value in batch.items()}
            labels = batch.pop("labels")
            logits = _logits(model(**batch))
            if labels.dim() == 2:
                logits, labels = logits[:, :-1], labels[:, 1:]
            losses = nn.functional.cross_entropy(
                logits.float().flatten(0, -2), labels.flatten(), reduction="none"
            ).view(labels.shape)  # 0 where the label is IGNORED
            guesses = logits.argmax(-1) if labels.dim() == 2 else logits.float()
            for row, index in enumerate(chosen):
                keep = labels[row] != IGNORED
                found[index] = (
                    float(losses[row].double().sum()),
                    int(keep.sum()),
                    (guesses[row][keep] if labels.dim() == 2 else guesses[row]).cpu().numpy(),
                    labels[row][keep].cpu().numpy(),
                )
    sums, counts, predictions, truths = zip(*found, strict=True)
    join = numpy.concatenate if isinstance(items[0]["labels"], list) else numpy.stack
    return Evaluation(
        numpy.array(sums), numpy.array(counts), join(predictions), numpy.concatenate(truths)
    )


def _logits(outputs: Any) -> torch.Tensor:
    logits: torch.Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
    return logits
