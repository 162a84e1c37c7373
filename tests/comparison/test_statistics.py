"""Intervals and tests against scipy's own functions, disagreement against sums by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy
import pytest
from scipy import stats

from adarank_fast.comparison.metrics import METRICS, user_metric
from adarank_fast.comparison.statistics import disagreement, interval, paired


def test_paired_is_scipys():
    first, second = [0.86, 0.84, 0.88, 0.85], [0.85, 0.85, 0.84, 0.83]
    test = stats.ttest_rel(first, second)
    low, high = test.confidence_interval(0.95)
    found = paired(first, second)
    assert (found.p_value, found.count) == (pytest.approx(test.pvalue), 4)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.mean == pytest.approx(sum(first) / 4 - sum(second) / 4)
    assert not found.excludes_zero
    assert paired([1.0, 1.1, 1.2], [0.0, 0.0, 0.1]).excludes_zero
    with pytest.raises(ValueError):
        paired([1.0], [1.0, 2.0])


def test_interval_is_students():
    values = [0.1, 0.4, 0.25]
    half = stats.t.ppf(0.975, 2) * numpy.std(values, ddof=1) / math.sqrt(3)
    found = interval(values)
    assert (found.low, found.high) == (pytest.approx(0.25 - half), pytest.approx(0.25 + half))


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3, 0.1 + 0.2]])
def test_no_spread_no_interval(values):
    found = interval(values)
    assert (found.mean, found.low, found.high, found.p_value) == (pytest.approx(0.3), *[None] * 3)
    assert not found.excludes_zero


def test_disagreement():
    one = numpy.log(numpy.array([[0.5, 0.5], [0.9, 0.1]]))
    other = numpy.log(numpy.array([[0.7, 0.3], [0.2, 0.8]]))
    third = numpy.log(numpy.array([[0.1, 0.9], [0.2, 0.8]]))
    assert disagreement([one, other]) == {"argmax": 0.5, "tv": pytest.approx((0.2 + 0.7) / 2)}
    tv = [(0.2 + 0.7) / 2, (0.4 + 0.7) / 2, 0.6 / 2]
    found = disagreement([one, other, third + 5.0])  # logits may be shifted
    assert found == {"argmax": pytest.approx(2 / 3), "tv": pytest.approx(sum(tv) / 3)}
    tokens = numpy.array([1, 2, 3, 4])
    assert disagreement([tokens, numpy.array([1, 2, 0, 4])]) == {"argmax": 0.25}
    assert disagreement([one]) == {}


def test_perplexity_counts_tokens_not_items():
    found = SimpleNamespace(losses=numpy.array([2.0, 9.0]), counts=numpy.array([1, 9]))
    metric = METRICS["causal-lm"]
    assert metric.value(found) == pytest.approx(math.exp(1.1))
    assert metric.items is not None
    assert metric.items(found).tolist() == [2.0, 1.0]
    assert metric.better(3.0, 4.0)
    huge = SimpleNamespace(losses=numpy.array([1e6]), counts=numpy.array([1]))
    assert metric.value(huge) == math.inf


@pytest.mark.parametrize("returned", [None, "high", math.nan, True, [1.0, 2.0]])
def test_metric_without_a_number(returned):
    def mine(predictions, labels):
        return returned

    with pytest.raises(ValueError, match="metric mine returned .*not a finite number"):
        user_metric(mine, True).value(SimpleNamespace(predictions=0, labels=0))
