"""Losses, predictions and metrics of a model on items with labels."""

from __future__ import annotations

import math
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

    A label that is a list marks a language model: position t is compared with label t + 1.
    """
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(items)), key=lambda index: item_length(items[index]))
    found: dict[int, tuple[float, int, numpy.ndarray, numpy.ndarray]] = {}
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
    sums, counts, predictions, truths = zip(
        *(found[index] for index in range(len(items))), strict=True
    )
    join = numpy.concatenate if isinstance(items[0]["labels"], list) else numpy.stack
    return Evaluation(
        numpy.array(sums), numpy.array(counts), join(predictions), numpy.concatenate(truths)
    )


def _logits(outputs: Any) -> torch.Tensor:
    logits: torch.Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
    return logits


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """The metrics of an evaluation.

    Returns:
        Classification: accuracy and macro F1 (the mean over the classes that occur in labels or
        predictions), 0 to 1; mean loss in nats; examples. Language model: perplexity, mean loss in
        nats and accuracy of the likeliest token, over all tokens that count; tokens.
    """
    loss = float(evaluation.losses.sum() / max(evaluation.counts.sum(), 1))
    if evaluation.predictions.ndim == 1:
        right = float((evaluation.predictions == evaluation.labels).mean())
        return {
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "loss": loss,
            "accuracy": right,
            "tokens": int(evaluation.counts.sum()),
        }
    guesses, labels = evaluation.predictions.argmax(-1), evaluation.labels
    return {
        "accuracy": float((guesses == labels).mean()),
        "f1": macro_f1(guesses, labels),
        "loss": loss,
        "examples": len(labels),
    }


def macro_f1(guesses: numpy.ndarray, labels: numpy.ndarray) -> float:
    """F1 of each class that occurs, 2 TP / (2 TP + FP + FN), averaged."""
    both = [(guesses == one, labels == one) for one in numpy.union1d(guesses, labels)]
    return float(numpy.mean([2 * (g & t).sum() / (g.sum() + t.sum()) for g, t in both]))
