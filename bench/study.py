"""The study: every experiment of docs/results.md, in runs that can be stopped at any time.

    python -m bench.study                                   (or `make study`): all of it, hours
    python -m bench.study --only minilm-trec-r2 minilm-mr-r2
    python -m bench.study --minutes 30                      goes on where it stopped, for a while
    python -m bench.study --list                            what there is and how far it is

The training experiments are comparisons by `ada.compare`, whose finished runs lie in
.benchmarks/study/NAME, with the report of those so far. What they come to is a row of
bench/results/study.json, written anew whenever a seed is through with all arms, so that a part of
an experiment can be read, too. The others predict ranks and train nothing: bench/study_plans.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adarank_fast as ada
from adarank_fast.comparison.report import Comparison
from adarank_fast.demo.assets import Examples, minilm, mpnet, mr, smollm2, trec
from bench import study_plans
from bench.results_file import FOLDER, write_results
from bench.slices import ROOT

WORK = ROOT / ".benchmarks" / "study"
RESULTS = FOLDER / "study.json"
Data = tuple[Any, Any]


def fine_trec() -> tuple[Examples, Examples]:
    return trec(fine=True)


def mr_sentences() -> tuple[list[str], list[str]]:
    """MR as plain text: its labels are dropped."""
    train, held_out = mr()
    return [text for text, _ in train], [text for text, _ in held_out]


@dataclass(frozen=True)
class Experiment:
    """One comparison.

    Attributes:
        title: in the page.
        model: makes the model's folder.
        data: (train, held out).
        seeds: how many.
        options: of `compare`.
    """

    title: str
    model: Callable[[], Path]
    data: Callable[[], Data]
    options: Mapping[str, Any]
    seeds: int = 3
    arms: tuple[str, ...] = ("adarank", "uniform")


SHORT = dict(max_length=64, epochs=3, average_rank=2, learning_rates=(1e-3, 2e-3, 4e-3))
WIDE = dict(SHORT, learning_rates=(1e-3, 2e-3, 4e-3, 8e-3))
HIGHER = (2e-3, 4e-3, 8e-3, 1.6e-2)  # few steps for 50 classes
TRAINING = {
    "minilm-trec-r2": Experiment(
        "MiniLM, TREC with 50 classes, average rank 2",
        minilm,
        fine_trec,
        dict(SHORT, learning_rates=HIGHER),
        seeds=5,
        arms=("adarank", "uniform", "random", "reversed", "eva"),
    ),
    "minilm-trec-r8": Experiment(
        "MiniLM, TREC with 50 classes, average rank 8",
        minilm,
        fine_trec,
        dict(SHORT, average_rank=8, learning_rates=HIGHER),
    ),
    "smollm2-text": Experiment(
        "SmolLM2-135M, plain text, average rank 8, bfloat16",
        smollm2,
        mr_sentences,
        dict(  # 200 steps of 1,024 tokens
            average_rank=8,
            dtype="bfloat16",
            batch_size=8,
            max_length=128,
            epochs=2,
            max_steps=200,
            trials=3,
            learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
        ),
    ),
    "minilm-mr-r2": Experiment("MiniLM, MR, average rank 2", minilm, mr, SHORT, seeds=5),
    "mpnet-trec-r2": Experiment(
        "MPNet-base, TREC with 50 classes, average rank 2", mpnet, fine_trec, SHORT
    ),
    # what the page says of them: the sweep chooses a rate that three epochs do not stand
    "minilm-mr-r2-wide": Experiment(
        "MiniLM, MR, average rank 2, rates up to 0.008", minilm, mr, WIDE, seeds=5
    ),
    "mpnet-trec-r2-wide": Experiment(
        "MPNet-base, TREC with 50 classes, average rank 2, rates up to 0.008",
        mpnet,
        fine_trec,
        WIDE,
    ),
}
NAMES = (*study_plans.EXPERIMENTS, *TRAINING)


class Enough(Exception):
    """What was asked for is done; the rest is for another time."""


@dataclass
class Limit:
    """Hears of every finished run, and says when to stop."""

    cells: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.began, self.done = time.monotonic(), 0

    def __call__(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
        self.done += 1
        if self.done == self.cells or 0 < self.seconds < time.monotonic() - self.began:
            raise Enough


def train(name: str, experiment: Experiment, limit: Callable[[str], object]) -> None:
    """Run what is missing of a comparison, a seed after the other."""
    model, (train_data, held_out) = experiment.model(), experiment.data()
    for seeds in range(_finished(name) + 1, experiment.seeds + 1):
        report = ada.compare(
            model,
            train_data,
            held_out,
            experiment.arms,
            seeds,
            title=experiment.title,
            work_dir=WORK / name,
            progress=limit,
            **experiment.options,
        )
        report.save(WORK / name)
        write_results("study", name, {"seeds_planned": experiment.seeds, **small(report)})
        print(report.table(), flush=True)


def small(report: Comparison) -> dict[str, Any]:
    """A report's results without the training curves, and each arm's ranks."""
    runs = [{k: v for k, v in run.items() if k != "curve"} for run in report.results["runs"]]
    ranks = {arm: list(plan.ranks.values()) for arm, plan in report.plans.items()}
    step = statistics.median(run["step_seconds"] for run in runs)
    return {"results": {**report.results, "runs": runs}, "ranks": ranks, "step_seconds": step}


def _finished(name: str) -> int:
    """Seeds that the results have."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return len(rows[name]["results"]["settings"]["seeds"]) if name in rows else 0


def show() -> None:
    """Print every experiment and how much of it is done."""
    for name in NAMES:
        if name in TRAINING:
            asked = TRAINING[name].seeds
            print(f"{name:18} {_finished(name)} of {asked} seeds: {TRAINING[name].title}")
        else:
            done, asked = study_plans.progress(name)
            print(f"{name:18} {done} of {asked} predictions: {study_plans.EXPERIMENTS[name]}")


def main() -> None:
    """Run what is not finished, in the order of `NAMES`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--cells", type=int, default=0, help="stop after so many runs (0: all)")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no run after this time")
    parser.add_argument("--list", action="store_true", help="say what is done, and run nothing")
    asked = parser.parse_args()
    if asked.list:
        show()
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    limit = Limit(asked.cells, 60 * asked.minutes)
    try:
        for name in asked.only:
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            if name in TRAINING:
                train(name, TRAINING[name], limit)
            else:
                study_plans.predict(name, limit)
    except Enough:
        print("stopped as asked; the same command goes on", file=sys.stderr)


if __name__ == "__main__":
    main()
