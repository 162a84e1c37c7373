"""Intervals of an accuracy, as a report says them."""

from adarank_fast.comparison.findings import say_interval
from adarank_fast.comparison.report_writer import _scaled


def test_an_interval_of_an_accuracy_stays_within_its_bounds() -> None:
    results = {"settings": {"metric": "accuracy"}}
    wide = {"low": -0.1, "high": 1.2}
    assert say_interval(results, wide) == "0.0 to 100.0%"
    assert say_interval(results, wide, difference=True) == "-10.00 to +100.00 points"
    drawn = _scaled(results, {"0": 0.5, "1": None}, {**wide, "mean": 0.5})
    assert drawn == ([50.0], 0.0, 100.0)
    results["settings"]["metric"] = "perplexity"
    assert say_interval(results, wide) == "-0.1 to 1.2"
