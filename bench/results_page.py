"""Writes docs/results.md from what the study found, under bench/results/.

    python -m bench.results_page            (or `make results-page`)

Its words are in bench/texts, those of a claim are `adarank compare`'s. It says nothing that the
files do not; what they lack is "not run yet". A test compares page and files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import adarank_fast as ada
from adarank_fast.comparison.findings import NONE, remarks, say, say_interval, tables, verdicts
from bench.pages import DOCS, machines, table, texts, wrapped, write_page
from bench.results_file import Row, read_results
from bench.study import TRAINING, Experiment
from bench.study_plans import EXPERIMENTS, METRICS, MODELS, SEEDS, TEXTS, USUAL, planned

PAGE = DOCS / "results.md"

QUESTIONS = {  # a line of the second table: rows of the files that it sums up
    "another seed": ("stability", [f"seed {seed}" for seed in SEEDS]),
    "another output": ("outputs", ["last hidden state", "first token", "untrained pooler"]),
    "logits, by metric": ("outputs", [f"logits, {metric}" for metric in METRICS]),
    "fewer or more calibration texts": ("stability", [f"{count} texts" for count in TEXTS]),
    "other questions": ("stability", ["other questions", "yet other questions"]),
    "texts of another kind (MR)": ("stability", ["MR"]),
    "noise that accumulates": ("accumulating", ["accumulating", "compounding"]),
}


@dataclass(frozen=True)
class Agreement:
    """How far two lists of scores lead to the same ranks."""

    changed: Mapping[int, int]  # average rank -> how many modules get another rank
    moved: float  # share of the budget that goes elsewhere, at average rank 8
    modules: int
    spearman: float  # of the scores

    @classmethod
    def of(cls, usual: Sequence[float], other: Sequence[float]) -> Agreement:
        from scipy.stats import spearmanr

        def changes(average: int) -> list[int]:
            one, two = (
                ada.allocate_ranks({f"{i:04}": score for i, score in enumerate(scores)}, average)
                for scores in (usual, other)
            )
            return [abs(one[name] - two[name]) for name in one]

        changed = {average: sum(map(bool, changes(average))) for average in (2, 8)}
        moved = sum(changes(8)) / 2 / (8 * len(usual))
        return cls(changed, moved, len(usual), float(spearmanr(usual, other).statistic))


def agreements(plans: Mapping[str, Row], accumulating: Mapping[str, Row]) -> dict[str, Agreement]:
    """ "MODEL: WHAT IS DIFFERENT" -> its agreement with the usual plan."""
    found = {}
    for name, row in plans.items():
        usual = f"{name.partition(': ')[0]}: {USUAL}"
        if name != usual and usual in plans:
            found[name] = Agreement.of(plans[usual]["scores"], row["scores"])
    for model, row in accumulating.items():
        flat = {how: [*chain(*by_type.values())] for how, by_type in row["scores"].items()}
        exact = flat.pop("exact")
        found |= {f"{model}: {how}": Agreement.of(exact, other) for how, other in flat.items()}
    return found


def command(name: str) -> str:
    if name == "accumulating":
        return "`python -m bench.accumulating`"
    return f'`make study ARGS="--only {name}"`'


def claims(name: str, experiment: Experiment, row: Row | None) -> list[Sequence[str]]:
    """Of one experiment, a line for each arm beside uniform."""
    arms = [arm for arm in experiment.arms if arm != "uniform"]
    if row is None:
        beside = f"{experiment.title}: {', '.join(arms)} beside uniform"
        return [(f"{beside}: not run yet", NONE, NONE, NONE, command(name))]
    results = row["results"]
    told = iter(verdicts(results))
    lines = []
    for arm, found in results["differences"].items():
        if found is None:
            said, figures = f"a run of {arm} or uniform diverged", (NONE, NONE, NONE)
        else:
            said = next(told)[0].removesuffix(".")
            items = found["items"]
            over_items = say_interval(results, items, True)
            if results["items_are"] != results["settings"]["metric"] and over_items != NONE:
                over_items = f"{items['low']:+.4f} to {items['high']:+.4f} ({results['items_are']})"
            figures = (
                say(results, found["seeds"]["mean"], True),
                say_interval(results, found["seeds"], True),
                over_items,
            )
        lines.append((f"{experiment.title}: {said}{_so_far(row)}", *figures, command(name)))
    return lines


def _so_far(row: Row) -> str:
    done, planned = len(row["results"]["settings"]["seeds"]), row["seeds_planned"]
    return "" if done == planned else f" ({done} of {planned} seeds so far)"


def question(title: str, found: Mapping[str, Agreement]) -> Sequence[str]:
    """One line of the second table."""
    experiment, keys = QUESTIONS[title]
    cells = []
    for model in MODELS:
        mine = [found[f"{model}: {key}"] for key in keys if f"{model}: {key}" in found]
        changed = _range([f"{agreement.changed[8]}" for agreement in mine])
        moved = _range([f"{100 * agreement.moved:.0f}" for agreement in mine])
        cells.append(f"{changed} of {mine[0].modules} ({moved}%)" if mine else NONE)
    return (title, *cells, command(experiment))


def _range(values: Sequence[str]) -> str:
    """4 to 9; of numbers written alike."""
    low, high = (str(f(values, key=float)) for f in (min, max)) if values else ("", "")
    return low if low == high else f"{low} to {high}"


def detail(experiment: Experiment, name: str, row: Row | None) -> str:
    """One comparison: its arms, what else must be known, and every seed."""
    title = f"### {experiment.title}"
    if row is None:
        return f"{title}\n\nNot run yet: {command(name)}."
    results = row["results"]
    (headline, header, quality), (_, cost_header, cost) = tables(results)
    seeds = [str(seed) for seed in results["settings"]["seeds"]]
    by_seed = [
        [arm, *(say(results, numbers["by_seed"][seed]) for seed in seeds)]
        for arm, numbers in results["arms"].items()
    ]
    lines = [[*one, *more[1:4]] for one, more in zip(quality, cost, strict=True)]
    parts = [
        title,
        wrapped(
            f"{headline}{_so_far(row)}. {results['settings']['train_items']:,} training items, "
            f"{results['settings']['held_out_items']:,} held out."
        ),
        table((*header, *cost_header[1:4]), lines),
        "\n".join(wrapped(f"- {line}", hanging="  ") for line in remarks(results)),
        table(("arm", *(f"seed {seed}" for seed in seeds)), by_seed),
    ]
    return "\n\n".join(part for part in parts if part)


def plan_table(found: Mapping[str, Agreement]) -> str:
    """Every prediction beside the usual one."""
    rows = [row.partition(": ")[2] for name in EXPERIMENTS for row in planned(name)]
    keys = dict.fromkeys([*rows, *QUESTIONS["noise that accumulates"][1]])

    def cell(a: Agreement | None) -> str:
        if a is None:
            return NONE
        changed = f"{a.changed[2]} and {a.changed[8]} of {a.modules}"
        return f"{changed}; {a.moved:.1%}; {a.spearman:.3f}"

    lines = [
        (key, *(cell(found.get(f"{model}: {key}")) for model in MODELS))
        for key in keys
        if key != USUAL
    ]
    return table(("what is different", *MODELS), lines)


def cost(trained: Mapping[str, Row], plans: Mapping[str, Row]) -> str:
    """Hours, by the clock and of the CPU."""
    keys = ("cell_seconds", "cell_cpu_seconds")
    lines = [(name, *(row["results"][key] for key in keys)) for name, row in trained.items()]
    if plans:
        seconds = [sum(row[key] for row in plans.values()) for key in ("seconds", "cpu_seconds")]
        lines.append(("outputs and stability", *seconds))
    if not lines:
        return "Nothing is run yet."
    lines.append(("all", *(sum(line[column] for line in lines) for column in (1, 2))))
    return table(
        ("runs", "hours by the clock", "CPU hours"),
        [(name, f"{clock / 3600:.2f}", f"{cpu / 3600:.2f}") for name, clock, cpu in lines],
    )


def page(folder: Path | None = None) -> str:
    """The whole page, of the files in `folder`, or of those of the repository."""
    lead, words = texts(PAGE.name)
    names = ("study", "study_plans", "accumulating")
    trained, plans, accumulating = (read_results(name, folder) for name in names)
    found = agreements(plans, accumulating)
    over = ("difference", "95% interval over seeds", "over held-out items")
    lines = [line for n, one in TRAINING.items() for line in claims(n, one, trained.get(n))]
    asked = ("ranks that change at average rank 8 (share of the budget)", *MODELS, "command")
    parts = [
        lead,
        table(("model, data: claim", *over, "command"), lines),
        table(asked, [question(title, found) for title in QUESTIONS]),
        f"## Training\n\n{wrapped(words['Training'])}",
        *(detail(one, name, trained.get(name)) for name, one in TRAINING.items()),
        f"## Plans\n\n{wrapped(words['Plans'])}",
        plan_table(found),
        f"## Cost\n\n{wrapped(words['Cost'])}",
        cost(trained, plans),
    ]
    if trained or plans:
        parts.append(machines({**trained, **plans}))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    write_page(PAGE, page())
