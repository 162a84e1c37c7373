"""Intervals of an accuracy, as a report says them."""

from adarank_fast.comparison.findings import say_interval


def test_an_interval_of_an_accuracy_stays_within_its_bounds() -> None:
    results = {"settings": {"metric": "accuracy"}}
    wide = {"low": -0.1, "high": 1.2}
    assert say_interval(results, wide) == "0.0 to 100.0%"
    assert say_interval(results, wide, difference=True) == "-10.00 to +120.00 points"
