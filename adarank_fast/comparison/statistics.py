"""What runs of several arms say: intervals, paired tests, disagreement. Numbers in, numbers out.

Two things vary: the seed of a run and the items it is evaluated on. Each is looked at alone, the
other averaged out, with Student's t as scipy computes it. A difference that holds over both is
called more than chance.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from adarank_fast.comparison.numbers import IntervalNumbers

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: of the sample.
        low, high: the interval at `LEVEL`; None where the sample does not give one.
        count: size of the sample.
        p_value: of the two-sided t test that the mean is 0; None where there is none.
    """

    mean: float
    low: float | None
    high: float | None
    count: int
    p_value: float | None

    def numbers(self) -> IntervalNumbers:
        """As results.json has it."""
        return {
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "count": self.count,
            "p_value": self.p_value,
        }

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0; False where there is no interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval for the mean of independent values; for differences, the paired test.

    Two values are needed, and they must not all be the same (but for rounding): then their spread
    says nothing.
    """
    from scipy.stats import ttest_1samp

    mean = statistics.fmean(values)
    same = math.isclose(min(values), max(values), rel_tol=1e-9, abs_tol=1e-12)
    if len(values) < 2 or same:
        return Interval(mean, None, None, len(values), None)
    test = ttest_1samp(values, 0.0)
    limits = test.confidence_interval(LEVEL)
    return Interval(mean, float(limits.low), float(limits.high), len(values), float(test.pvalue))


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The interval of the mean of first - second, and scipy's paired t test (`ttest_rel`).

    Raises:
        AdarankError: not as many values on either side.
    """
    return interval([one - other for one, other in zip(first, second, strict=True)])


def disagreement(predictions: Sequence[numpy.ndarray]) -> dict[str, float]:
    """How far models disagree, the mean over all pairs of them.

    Args:
        predictions: of each model: [N, C] logits, or [N] predicted tokens.

    Returns:
        "argmax": share of items that two models label differently; from logits also "tv": the
        total variation distance of their probabilities, half the sum over classes of |p - q|.
        Empty for fewer than two models.
    """

    def mean(
        apart: Callable[[numpy.ndarray, numpy.ndarray], numpy.ndarray],
        values: Sequence[numpy.ndarray],
    ) -> float:
        pairs = itertools.combinations(values, 2)
        return statistics.fmean(float(apart(p, q).mean()) for p, q in pairs)

    if len(predictions) < 2:
        return {}
    if predictions[0].ndim == 1:
        return {"argmax": mean(numpy.not_equal, predictions)}
    from scipy.special import softmax

    chances = [softmax(one.astype(numpy.float64), axis=-1) for one in predictions]
    return {
        "argmax": mean(numpy.not_equal, [one.argmax(-1) for one in predictions]),
        "tv": mean(lambda p, q: abs(p - q).sum(-1), chances) / 2,
    }
