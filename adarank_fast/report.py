"""What two arms' runs say, honestly: the table, the sentences, the report with its pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adarank_fast.plan import RankPlan, replacing
from adarank_fast.training import Run

STUDENT = {1: 12.7, 2: 4.3, 3: 3.2, 4: 2.8, 5: 2.6, 6: 2.4, 7: 2.4, 8: 2.3, 9: 2.3}  # t, 97.5%
HEADER = ("arm", "held-out accuracy", "adapter parameters", "seconds a step", "prediction")


@dataclass(frozen=True)
class Estimate:
    """A mean over held-out items and seeds with its standard error.

    Items and seeds are two independent samples: error**2 = items_error**2 + seeds_error**2. Each
    part is the standard deviation of what it varies (averaged over the other) over the root of its
    number. The interaction of both is in both parts, so the error errs on the large side. With one
    seed the second part is unknown and left out.
    """

    mean: float
    items_error: float
    seeds_error: float | None

    @property
    def error(self) -> float:
        return float((self.items_error**2 + (self.seeds_error or 0.0) ** 2) ** 0.5)


def estimate(values: Sequence[Sequence[float]]) -> Estimate:
    """Mean and standard error of `values[seed][item]`."""
    by_item = [statistics.fmean(column) for column in zip(*values, strict=True)]
    by_seed = [statistics.fmean(row) for row in values]
    return Estimate(statistics.fmean(by_item), _error(by_item) or 0.0, _error(by_seed))


def _error(sample: Sequence[float]) -> float | None:
    return statistics.stdev(sample) / len(sample) ** 0.5 if len(sample) > 1 else None


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Numbers of both arms, their paired difference, and what can honestly be said of it."""
    by_arm = {
        arm: sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed)
        for arm in dict.fromkeys(run.arm for run in runs)
    }
    correct = {arm: [list(map(float, run.correct)) for run in by_arm[arm]] for arm in by_arm}
    arms = {}
    for arm, mine in by_arm.items():
        accuracy = estimate(correct[arm])
        arms[arm] = {
            "accuracy": accuracy.mean,
            "accuracy_error": accuracy.error,
            "accuracy_by_seed": {str(run.seed): run.accuracy for run in mine},
            "parameters": mine[0].parameters,
            "step_seconds": statistics.median(run.step_seconds for run in mine),
        }
    first, second = by_arm
    difference = estimate(
        [
            [x - y for x, y in zip(mine, other, strict=True)]
            for mine, other in zip(correct[first], correct[second], strict=True)
        ]
    )
    return {
        "arms": arms,
        "difference": {
            "of": f"{first} - {second}",
            "accuracy": difference.mean,
            "error": difference.error,
            "items_error": difference.items_error,
            "seeds_error": difference.seeds_error,
        },
        "runs": [
            {
                "arm": run.arm,
                "seed": run.seed,
                "accuracy": run.accuracy,
                "parameters": run.parameters,
                "step_seconds": run.step_seconds,
                "losses": run.losses,
                "correct": "".join(str(int(value)) for value in run.correct),
            }
            for run in runs
        ],
    }


def reading(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say and what they do not, a sentence or two a line."""
    difference, settings = results["difference"], results["settings"]
    points, error = 100 * difference["accuracy"], 100 * difference["error"]
    seeds = len(settings["seeds"])
    over = f"the same {settings['held_out_items']:,} items"
    over += f" and {seeds} seeds" if seeds > 1 else "; the spread between seeds is not in it"
    size = f"The difference, {difference['of']}, of {points:+.1f} points"
    if abs(points) <= error:
        verdict = f"is within its standard error of {error:.1f}"
        meaning = "this run shows no difference"
    else:
        verdict = f"is {abs(points) / error:.1f} times its standard error of {error:.1f}"
        if seeds == 1:
            meaning = "more seeds are needed to tell"
        else:
            needed = STUDENT.get(seeds - 1, 2.0)
            meaning = (
                "more than chance explains" if abs(points) >= needed * error else "no evidence"
            )
            meaning += f" ({needed:.1f} times is the 5% mark with {seeds} seeds)"
    lines = [f"{size} {verdict} (paired over {over}): {meaning}."]
    steps = -(-settings["train_items"] // settings["batch_size"]) * settings["epochs"]
    training = steps * next(iter(results["arms"].values()))["step_seconds"]
    lines.append(
        f"Predicting the ranks took {results['prediction_seconds']:.1f} s, one training run about "
        f"{training:.0f} s."
    )
    return lines


def rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The report's table: a row an arm, under `HEADER`."""
    return [
        (
            arm,
            f"{numbers['accuracy']:.1%} ± {numbers['accuracy_error']:.1%}",
            f"{numbers['parameters']:,}",
            f"{numbers['step_seconds']:.3f}",
            f"{results['prediction_seconds']:.1f} s" if arm == "adarank" else "-",
        )
        for arm, numbers in results["arms"].items()
    ]


def error_note(results: Mapping[str, Any]) -> str:
    """What the ± is over."""
    settings = results["settings"]
    seeds = len(settings["seeds"])
    spread = f" and over {seeds} seeds, both together" if seeds > 1 else "; one seed"
    return f"± standard error over {settings['held_out_items']:,} held-out items{spread}"


def table(results: Mapping[str, Any]) -> Any:
    """The rich table that the command prints."""
    from rich import box
    from rich.table import Table

    settings = results["settings"]
    title = f"{settings['model']} on {settings['data']}, {settings['classes']} classes"
    made = Table(box=box.SIMPLE, title=title, caption=error_note(results), pad_edge=False)
    for column in HEADER:
        made.add_column(column, justify="left" if column == "arm" else "right")
    for row in rows(results):
        made.add_row(*row)
    return made


def write_report(folder: Path, results: Mapping[str, Any], plan: RankPlan) -> None:
    """report.md, three pictures, plan.json, results.json; each file appears whole or not at all."""
    from adarank_fast.plots import plot_disagreement, plot_ranks, plot_training

    plan.save(folder / "plan.json")
    plot_disagreement(plan, folder / "disagreement.png")
    plot_ranks(plan, folder / "ranks.png")
    plot_training(curves(results), folder / "training.png", "training loss")
    for name, text in (
        ("results.json", json.dumps(results, indent=1)),
        ("report.md", markdown(results, plan)),
    ):
        with replacing(folder / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def curves(results: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Each arm's training loss, the mean over its seeds."""
    seeds = len(results["settings"]["seeds"])
    found = {}
    for arm in results["arms"]:
        mine = [run["losses"] for run in results["runs"] if run["arm"] == arm]
        label = f"{arm}, mean of {seeds} seeds" if seeds > 1 else arm
        found[label] = [
            (points[0][0], statistics.fmean(value for _, value in points))
            for points in zip(*mine, strict=True)
        ]
    return found


def markdown(results: Mapping[str, Any], plan: RankPlan) -> str:
    """The report, for people."""
    settings = results["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    table_lines = [HEADER, tuple("---" for _ in HEADER), *rows(results)]
    by_seed = "; ".join(
        f"{arm}: " + ", ".join(f"{value:.1%}" for value in numbers["accuracy_by_seed"].values())
        for arm, numbers in results["arms"].items()
    )
    ranks = plan.ranks.values()
    return f"""\
# Mixed ranks beside uniform LoRA

{settings["model"]} on {settings["data"]}, {settings["classes"]} classes,
{settings["train_items"]:,} training items, {settings["held_out_items"]:,} held out.

{chr(10).join("| " + " | ".join(line) + " |" for line in table_lines)}

{error_note(results)}. By seed: {by_seed}.

{chr(10).join(f"- {line}" for line in reading(results))}

## How much each module matters

![Disagreement by layer and module type](disagreement.png)

Each module's weight and bias were perturbed {settings["trials"]} times, and the mean-pooled output
compared with that of the untouched model on {settings["calibration_texts"]} texts, without labels.

## Where the rank went

![Rank of each module](ranks.png)

The same number of parameters as uniform LoRA of rank {settings["average_rank"]}: ranks from
{min(ranks)} to {max(ranks)}.

## Training

![Training loss of both arms](training.png)

{settings["epochs"]} epochs, batch size {settings["batch_size"]}, learning rate
{settings["learning_rate"]:g} (linear decay), {settings["scaling"]}, seeds
{", ".join(map(str, settings["seeds"]))}; the same order of items, initial head and settings for
both arms. Seconds a step are medians on {results["threads"]} CPU threads.

Made on {results["date"]} in {results["total_seconds"]:.0f} s with {versions}. The raw numbers are
in results.json, the plan is plan.json.
"""
