"""What the seconds of a benchmark come to."""

from __future__ import annotations

from collections.abc import Mapping

from adarank_fast.benchmarking.arms import FLOORS, FROZEN, PEFT, SAME
from adarank_fast.benchmarking.measure import Statistic, bootstrap
from adarank_fast.benchmarking.report import Interval, Row


def figures(name: str, seconds: Mapping[str, list[float]], tokens: int) -> Row:
    """Medians and 95% intervals: ms a step, overhead over frozen, and its ratio to PEFT's.

    Args:
        name: a variant.
        seconds: of every repetition of every variant.
        tokens: of a step.
    """

    def interval(statistic: Statistic, *names: str) -> Interval:
        found = bootstrap([{one: seconds[one] for one in names}], statistic)
        low, high = found[1:]
        return {"value": found[0], "low": low, "high": high}

    took = interval(lambda m: 1e3 * m[0][name], name)
    made: Row = {"milliseconds": took, "tokens_per_second": tokens / (took["value"] / 1e3)}
    floor = FLOORS.get(name, FROZEN)
    if name in (FROZEN, *FLOORS.values()) or floor not in seconds:
        return made
    made["overhead"] = interval(lambda m: m[0][name] / m[0][floor] - 1, name, floor)
    theirs = SAME.get(name, PEFT)
    if name in (PEFT, *SAME.values()) or theirs not in seconds:
        return made
    other = interval(lambda m: m[0][theirs] / m[0][floor] - 1, theirs, floor)
    if other["low"] <= 0:  # PEFT's overhead may be zero
        made["overhead_over_peft"] = None
        return made

    def ratio(m: list[dict[str, float]]) -> float:
        under = m[0][theirs] - m[0][floor]
        return (m[0][name] - m[0][floor]) / under if under else 1e9

    made["overhead_over_peft"] = interval(ratio, name, theirs, floor)
    return made
