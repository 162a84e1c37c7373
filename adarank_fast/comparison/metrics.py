"""What training runs are judged by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsFloat

import numpy

from adarank_fast.errors import AdarankError

if TYPE_CHECKING:
    from adarank_fast.training.evaluation import Evaluation


@dataclass(frozen=True)
class Metric:
    """What runs are judged by, of an `Evaluation`.

    Attributes:
        value: one number for all items.
        items: a number for each, whose mean over items says the same; None: there is none.
        items_are: what the numbers of items are, in words.
    """

    name: str
    greater_is_better: bool
    value: Callable[[Evaluation], float]
    items: Callable[[Evaluation], numpy.ndarray] | None = None
    items_are: str = ""

    def better(self, one: float, other: float) -> bool:
        """Whether `one` beats `other`; equal values do not."""
        return one > other if self.greater_is_better else one < other


def _perplexity(evaluation: Evaluation) -> float:
    mean = evaluation.losses.sum() / evaluation.counts.sum()
    return math.exp(mean) if mean < 700 else math.inf


def _correct(evaluation: Evaluation) -> numpy.ndarray:
    correct = evaluation.predictions.argmax(-1) == evaluation.labels
    return numpy.asarray(correct, dtype=numpy.float64)


METRICS = {
    "classification": Metric(
        "accuracy", True, lambda found: float(_correct(found).mean()), _correct, "accuracy"
    ),
    "causal-lm": Metric(
        "perplexity",
        False,
        _perplexity,
        lambda found: found.losses / numpy.maximum(found.counts, 1),
        "loss in nats a token",
    ),
}


def user_metric(
    function: Callable[[numpy.ndarray, numpy.ndarray], SupportsFloat], greater_is_better: bool
) -> Metric:
    """A metric of predictions and labels (see `Evaluation`) that must return a finite number."""
    name = getattr(function, "__name__", type(function).__name__)

    def value(evaluation: Evaluation) -> float:
        try:
            returned = function(evaluation.predictions, evaluation.labels)
        except Exception as error:  # whatever somebody else's function says to what it gets
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise AdarankError(
                f"metric {name} failed ({said:.100}); it gets predictions and labels and must "
                "return one number"
            ) from error
        try:
            number = math.nan if isinstance(returned, bool) else float(returned)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            got = " ".join(repr(returned).split())
            raise AdarankError(
                f"metric {name} returned {got:.60}, not a finite number; it gets predictions "
                "and labels and must return one number"
            )
        return number

    return Metric(name, greater_is_better, value)
