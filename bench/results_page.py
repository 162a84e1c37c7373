"""Writes docs/results.md from what the study found, under bench/results/.

    python -m bench.results_page            (or `make results-page`)

The page says nothing that the files do not; what they lack is "not run yet". The words of a claim
are those of `adarank compare`. A test compares the committed page with the committed files.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adarank_fast as ada
from adarank_fast.comparison.findings import NONE, remarks, say, say_interval, tables, verdicts
from adarank_fast.files import replacing
from bench.benchmarks_page import machines, table
from bench.results_file import FOLDER
from bench.study import TRAINING, Experiment
from bench.study_plans import MODELS, USUAL, looks

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
Row = Mapping[str, Any]

TEXT = """# Results

Are mixed ranks worth it? Each line of the first table is one comparison with uniform LoRA of the
same number of parameters on held-out data; an interval that contains 0 means that no difference was
shown. The second says how many ranks change when a prediction looks at something else. Written by
`make results-page` from the files in `bench/results`; do not edit. What has no figures is not run
yet.
"""
TRAINED = """
Every arm has its own learning rate, the best of three or four after one epoch on a validation
split of the training data, and three epochs; the language model has 200 steps of 1,024 tokens of
MR's sentences. [comparing.md](comparing.md) has all definitions. `random` deals AdaRank's ranks
out at random, `reversed` gives the highest to the module that earned the lowest. The comparisons
"rates up to 0.008" say more about sweeps than about ranks: one epoch of one seed chose 0.008 for
uniform on MR and for both arms of MPNet, which three epochs do not stand. The study's own are
those with rates up to 0.004.
"""
PLANS = """
A prediction as usual: mean-pooled last hidden state, l1, seed 0, 32 TREC questions and five
trials (SmolLM2-135M: four blocks of 64 tokens of such questions and three trials). Each row
changes one thing. A cell has the ranks that differ from the usual plan's at average rank 2 and
at 8, the share of the budget that moves at 8, and Spearman's correlation of the scores. What
another seed changes is chance: less than that says nothing. `accumulating` and `compounding` are
the published procedure, whose noise stays, in two readings ([method.md](method.md)).
"""
COST = """
Runs on CPUs shared the machine with other work and were halted now and then, and on the GPU ten
or more shared one card: times by the clock are no benchmark (those are in
[benchmarks.md](benchmarks.md)), nor are the times of steps. CPU hours are those of all cores
added up.
"""

QUESTIONS = {  # a line of the second table: rows of the files that it sums up
    "another seed": ("stability", ("seed 1", "seed 2", "seed 3", "seed 4")),
    "another output": ("outputs", ("last hidden state", "first token", "untrained pooler")),
    "logits, by metric": (
        "outputs",
        tuple(f"logits, {metric}" for metric in ("l1", "tv", "kl", "js", "argmax")),
    ),
    "fewer or more calibration texts": (
        "stability",
        tuple(f"{count} texts" for count in (4, 8, 16, 64, 128)),
    ),
    "other questions": ("stability", ("other questions", "yet other questions")),
    "texts of another kind (MR)": ("stability", ("MR",)),
    "noise that accumulates": ("accumulating", ("accumulating", "compounding")),
}


@dataclass(frozen=True)
class Agreement:
    """How far two lists of scores lead to the same ranks.

    Attributes:
        changed: average rank -> how many modules get another rank.
        moved: share of the budget that goes elsewhere, at average rank 8.
        modules: how many there are.
        spearman: rank correlation of the scores.
    """

    changed: Mapping[int, int]
    moved: float
    modules: int
    spearman: float

    @classmethod
    def of(cls, usual: Sequence[float], other: Sequence[float]) -> Agreement:
        from scipy.stats import spearmanr

        def changes(average: int) -> list[int]:
            ranks = [
                ada.allocate_ranks({f"{i:04}": score for i, score in enumerate(scores)}, average)
                for scores in (usual, other)
            ]
            return [abs(ranks[0][name] - ranks[1][name]) for name in ranks[0]]

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
        flat = {
            procedure: [score for layers in by_type.values() for score in layers]
            for procedure, by_type in row["scores"].items()
        }
        for procedure, scores in flat.items():
            if procedure != "exact":
                found[f"{model}: {procedure}"] = Agreement.of(flat["exact"], scores)
    return found


def command(name: str) -> str:
    if name == "accumulating":
        return "`python bench/accumulating.py`"
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
        [say(results, numbers["by_seed"][seed]) for seed in seeds]
        for numbers in results["arms"].values()
    ]
    lines = [[*one, *more[1:4]] for one, more in zip(quality, cost, strict=True)]
    parts = [
        title,
        _wrapped(
            f"{headline}{_so_far(row)}. {results['settings']['train_items']:,} training items, "
            f"{results['settings']['held_out_items']:,} held out."
        ),
        table((*header, *cost_header[1:4]), lines),
        "\n".join(textwrap.fill(f"- {line}", 100, **HANGING) for line in remarks(results)),
        table(
            ("arm", *(f"seed {seed}" for seed in seeds)),
            [[arm, *values] for arm, values in zip(results["arms"], by_seed, strict=True)],
        ),
    ]
    return "\n\n".join(part for part in parts if part)


HANGING: dict[str, Any] = dict(subsequent_indent="  ", break_on_hyphens=False)


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


def plan_table(found: Mapping[str, Agreement]) -> str:
    """Every prediction beside the usual one."""
    keys: dict[str, None] = {}
    for mine in looks().values():
        keys |= dict.fromkeys(key for variants in mine.values() for key in variants)
    keys |= dict.fromkeys(QUESTIONS["noise that accumulates"][1])
    keys.pop(USUAL)
    lines = []
    for key in keys:
        mine = [found.get(f"{model}: {key}") for model in MODELS]
        cells = [
            f"{a.changed[2]} and {a.changed[8]} of {a.modules}; {a.moved:.1%}; {a.spearman:.3f}"
            if a
            else NONE
            for a in mine
        ]
        lines.append((key, *cells))
    return table(("what is different", *MODELS), lines)


def cost(trained: Mapping[str, Row], plans: Mapping[str, Row]) -> str:
    """Hours, by the clock and of the CPU."""
    lines = []
    for name, row in trained.items():
        results = row["results"]
        lines.append((name, results["cell_seconds"], results["cell_cpu_seconds"]))
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


def _read(folder: Path, name: str) -> dict[str, Row]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def page(folder: Path = FOLDER) -> str:
    """The whole page, of the files in `folder`."""
    trained, plans = _read(folder, "study"), _read(folder, "study_plans")
    found = agreements(plans, _read(folder, "accumulating"))
    header = (
        *("model, data: claim", "difference", "95% interval over seeds"),
        *("over held-out items", "command"),
    )
    rows: Iterable[Sequence[str]] = (
        line for name, one in TRAINING.items() for line in claims(name, one, trained.get(name))
    )
    asked = ("ranks that change at average rank 8 (share of the budget)", *MODELS, "command")
    parts = [
        TEXT.rstrip(),
        table(header, list(rows)),
        table(asked, [question(title, found) for title in QUESTIONS]),
        f"## Training\n\n{_wrapped(TRAINED)}",
        *(detail(one, name, trained.get(name)) for name, one in TRAINING.items()),
        f"## Plans\n\n{_wrapped(PLANS)}",
        plan_table(found),
        f"## Cost\n\n{_wrapped(COST)}",
        cost(trained, plans),
    ]
    if trained or plans:
        parts.append(machines({**trained, **plans}))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    text = page()
    with replacing(PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
