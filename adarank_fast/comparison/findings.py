"""What a comparison found, as tables and sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TypeVar

from adarank_fast.comparison.numbers import (
    ArmNumbers,
    CellNumbers,
    DifferenceNumbers,
    IntervalNumbers,
    Results,
    SweptNumbers,
)
from adarank_fast.comparison.statistics import Interval

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, header, rows
UNSTEADY, UNSTEADY_NATS = 0.2, 0.3  # of the sweep's loss; or this much
NONE = "-"
T = TypeVar("T")
Columns = list[tuple[str, Callable[[T], str]]]  # header, what a row's numbers say there


class _Row(ArmNumbers):
    """An arm of the tables."""

    arm: str
    seeds: IntervalNumbers | None


def say(results: Results, value: float | None, difference: bool = False) -> str:
    """A value of the metric, or a difference, in words: 86.3%, +0.40 points, 12.31."""
    if value is None:
        return NONE
    if results["settings"]["metric"] == "accuracy":
        return f"{100 * value:+.2f} points" if difference else f"{value:.1%}"
    return f"{value:+.3g}" if difference else f"{value:.4g}"


def say_interval(results: Results, found: IntervalNumbers | None, difference: bool = False) -> str:
    """A confidence interval in words, "1.2 to 3.4 points"; `NONE` where there is none."""
    if found is None or found["low"] is None or found["high"] is None:
        return NONE
    ends = [bounded(results, found[end], difference) for end in ("low", "high")]
    low, high = (say(results, end, difference) for end in ends)
    return f"{low.removesuffix(' points').removesuffix('%')} to {high}"


def bounded(results: Results, end: float | None, difference: bool = False) -> float | None:
    """An end of an interval, within what the metric can be: Student's t knows no bounds."""
    if end is None or results["settings"]["metric"] != "accuracy":
        return end
    return min(max(end, -1.0 if difference else 0.0), 1.0)


def tables(results: Results) -> list[Table]:
    """What is told of each arm: quality, and cost."""
    settings, baseline = results["settings"], results["baseline"]
    metric = settings["metric"]
    better = "" if settings["greater_is_better"] else " (lower is better)"
    unit = ", in points" if metric == "accuracy" else ""

    def value(n: _Row) -> str:
        if not n["value"]:
            return f"{len(n['diverged'])} of {len(n['by_seed'])} diverged"
        return _with_interval(results, n["value"])

    def change(n: _Row) -> str:
        return _with_interval(results, n["seeds"], True) if n["seeds"] else NONE

    quality: Columns[_Row] = [
        ("arm", itemgetter("arm")),
        (f"{metric} (95% interval)", value),
        (f"minus {baseline}{unit} (95% interval)", change),
        ("p", lambda n: _say_p(n["seeds"]["p_value"] if n["seeds"] else None)),
        (
            "items that seeds predict differently",
            lambda n: _known(n["seeds_disagree"].get("argmax"), ".1%"),
        ),
    ]
    if any("tv" in numbers["seeds_disagree"] for numbers in results["arms"].values()):
        title = "total variation between seeds"
        quality.append((title, lambda n: _known(n["seeds_disagree"].get("tv"), ".3f")))
    cost: Columns[_Row] = [
        ("arm", itemgetter("arm")),
        ("ranks", lambda n: " to ".join(map(str, sorted({n["lowest_rank"], n["highest_rank"]})))),
        ("parameters", lambda n: f"{n['parameters']:,}"),
        ("learning rate", lambda n: f"{n['learning_rate']:g}"),
        ("s/step", lambda n: f"{n['step_seconds']:.3f}"),
        ("tokens/s", lambda n: f"{n['tokens_per_second']:,.0f}"),
        ("prediction, s", lambda n: _known(n["prediction_seconds"], ".1f")),
        ("peak memory, MiB", lambda n: _known(n["peak_memory_bytes"], ",.0f", 2**20)),
    ]
    compared = {arm: found["seeds"] for arm, found in results["differences"].items() if found}
    arms: list[_Row] = [
        {"arm": arm, "seeds": compared.get(arm), **numbers}
        for arm, numbers in results["arms"].items()
    ]
    return [
        _table(f"Held-out {metric}{better}, mean over seeds", quality, arms),
        _table("Cost", cost, arms),
    ]


def _table(title: str, columns: Columns[T], rows: Sequence[T]) -> Table:
    return title, [name for name, _ in columns], [[cell(n) for _, cell in columns] for n in rows]


def _known(value: float | None, how: str, unit: float = 1) -> str:
    return NONE if value is None else format(value / unit, how)


def _with_interval(results: Results, found: IntervalNumbers, difference: bool = False) -> str:
    """83.4% (81.9 to 85.0); of a difference -1.07 (-2.48 to 0.35), its unit is in the header."""
    text = say(results, found["mean"], difference).removesuffix(" points")
    if found["low"] is None:
        return text
    around = say_interval(results, found, difference).removesuffix(" points").removesuffix("%")
    return f"{text} ({around.replace('+', '')})"


def _say_p(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else _known(value, ".3f")


def detail_tables(results: Results) -> list[Table]:
    """Every run, and the sweep."""
    metric = results["settings"]["metric"]

    def value(n: SweptNumbers) -> str:
        return n["diverged"] or say(results, n["value"])

    def loss(n: SweptNumbers) -> str:
        return _known(n["loss"], ".4f")

    runs: Columns[CellNumbers] = [
        ("arm", itemgetter("arm")),
        ("seed", lambda n: str(n["seed"])),
        (metric, value),
        ("held-out loss", loss),
        ("training, s", lambda n: f"{n['training_seconds']:.1f}"),
    ]
    sweep: Columns[SweptNumbers] = [
        ("arm", itemgetter("arm")),
        ("learning rate", lambda n: f"{n['learning_rate']:g}"),
        (f"validation {metric}", value),
        ("validation loss", loss),
    ]
    made = [_table("Runs", runs, results["runs"])]
    return [*made, _table("Learning rates", sweep, results["sweep"])] if results["sweep"] else made


def reading(results: Results) -> list[str]:
    """What the numbers say and what they do not, a sentence or two a line."""
    return [*(" ".join(pair) for pair in verdicts(results)), *remarks(results)]


def verdicts(results: Results) -> list[tuple[str, str]]:
    """Of each arm that is compared: what may be claimed, and the figures behind it."""
    return [
        (
            _claim(results, arm, Interval(**found["seeds"]), found["items"]),
            _figures(results, arm, Interval(**found["seeds"]), found),
        )
        for arm, found in results["differences"].items()
        if found is not None
    ]


def unsteady(results: Results) -> dict[str, list[int]]:
    """Arm -> seeds whose run ended worse than one epoch of the sweep at the same rate did.

    By the metric, and in the loss by more than a share or a number of nats: far more than lies
    between the sweep's validation split and the held-out items.
    """
    sign = 1 if results["settings"]["greater_is_better"] else -1
    swept = {(cell["arm"], cell["learning_rate"]): cell for cell in results.get("sweep", [])}
    found: dict[str, list[int]] = {}
    for run in results.get("runs", []):
        cell = swept.get((run["arm"], run["learning_rate"]))
        if cell is None or run["diverged"] or cell["diverged"]:
            continue
        value, loss, value_then, loss_then = (
            run["value"], run["loss"], cell["value"], cell["loss"]
        )  # fmt: skip
        if value is None or loss is None or value_then is None or loss_then is None:
            continue
        worse = sign * value < sign * value_then
        if worse and loss - loss_then > min(UNSTEADY * loss_then, UNSTEADY_NATS):
            found.setdefault(run["arm"], []).append(run["seed"])
    return found


def remarks(results: Results) -> list[str]:
    """Notes on runs that failed, and on what the numbers cannot show."""
    settings, baseline = results["settings"], results["baseline"]
    lines = [
        f"{arm}, seed {seed}, diverged: {reason}. Its arm has no mean and is not compared."
        for arm, numbers in results["arms"].items()
        for seed, reason in numbers["diverged"].items()
    ]
    for arm, numbers in unsteady(results).items():
        lines.append(
            f"{len(numbers)} of {len(settings['seeds'])} runs of {arm} became unstable: they ended "
            "worse than the one epoch that chose their learning rate. The rate is too high for "
            "more epochs; give lower ones."
        )
    compared = [found for found in results["differences"].values() if found is not None]
    seeds = len(settings["seeds"])
    if seeds == 1:
        lines.append("One seed gives no interval over seeds and no test; run at least 2.")
    elif seeds == 2 and compared:
        lines.append("Two seeds give very wide intervals (12.7 standard errors either way).")
    if len(compared) > 1:
        lines.append(
            f"{len(compared)} arms are compared with {baseline}; intervals and p are "
            "not corrected for their number."
        )
    edge = [arm for arm, numbers in results["arms"].items() if numbers["rate_at_the_edge"]]
    if edge:
        lines.append(
            f"The best learning rate lies at the edge of the sweep for {', '.join(edge)}; a wider "
            "one may suit better."
        )
    variation = ""
    if settings["task"] == "classification":
        variation = (
            " and by the total variation distance of their probabilities (0: the same, 1: "
            "nothing in common)"
        )
    if all(arm["seeds_disagree"] for arm in results["arms"].values()):
        lines.append(
            "Between seeds: models of one arm that differ only in their seed are compared two by "
            f"two, by the share of items that they predict differently{variation}."
        )
    return lines


def _claim(results: Results, arm: str, seeds: Interval, by_item: IntervalNumbers | None) -> str:
    settings, baseline = results["settings"], results["baseline"]
    metric = settings["metric"]
    items = Interval(**by_item) if by_item else None
    if seeds.low is None:
        return f"More seeds are needed to tell {arm} from {baseline} in {metric}."
    if apart := [name for name in (arm, baseline) if name in unsteady(results)]:
        return (
            f"Nothing can be said of {arm} and {baseline}: runs of {' and '.join(apart)} became "
            "unstable at the learning rate that the sweep chose."
        )
    if not seeds.excludes_zero:
        claim = f"No evidence of a difference in {metric} between {arm} and {baseline}"
        if items is not None and items.excludes_zero:
            claim += ": there is one on these items, but other seeds may not show it"
        return f"{claim}."
    better = (seeds.mean > 0) == settings["greater_is_better"]
    claim = f"{arm} is {'better' if better else 'worse'} in {metric} than {baseline}"
    if items is None:
        return f"{claim}, by more than chance over seeds; chance over items is not known."
    if items.excludes_zero and (items.mean > 0) == (seeds.mean > 0):
        return f"{claim}, by more than chance explains."
    return f"{claim} over seeds, on these items; other items may say otherwise."


def _figures(results: Results, arm: str, seeds: Interval, difference: DifferenceNumbers) -> str:
    settings = results["settings"]
    line = f"{arm} minus {results['baseline']}: {say(results, seeds.mean, True)}"
    if not settings["greater_is_better"]:
        line += " (below 0 is better)"
    if seeds.low is not None:
        line += f", 95% interval {say_interval(results, difference['seeds'], True)}"
        line += f" over {seeds.count} seeds (paired t test, p = {seeds.p_value:.2g})"
    elif seeds.count > 1:
        line += f", the same at all {seeds.count} seeds, so that there is no interval over them"
    items = difference["items"]
    if items is not None and items["low"] is not None:
        said = f"{items['low']:+.4g} to {items['high']:+.4g} ({results['items_are']})"
        if results["items_are"] == settings["metric"]:
            said = say_interval(results, items, True)
        line += f"; {said} over {items['count']:,} held-out items"
    return f"{line}."
