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
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import adarank_fast as ada
from adarank_fast.comparison.report import Comparison
from adarank_fast.demo.assets import minilm, mpnet, mr, smollm2, trec
from bench import study_plans
from bench.results_file import read_results, write_results

WORK = Path(__file__).parent.parent / ".benchmarks" / "study"


def mr_sentences() -> tuple[list[str], ...]:
    """MR as plain text: its labels are dropped."""
    return tuple([text for text, _ in part] for part in mr())


@dataclass(frozen=True)
class Experiment:
    """One comparison; `options` are those of `ada.compare`."""

    title: str
    model: Callable[[], Path]
    data: Callable[[], tuple[Any, Any]]  # to train on, held out
    options: Mapping[str, Any]
    seeds: int = 3
    arms: tuple[str, ...] = ("adarank", "uniform")


SHORT = dict(max_length=64, epochs=3, average_rank=2, learning_rates=(1e-3, 2e-3, 4e-3))
WIDE = dict(SHORT, learning_rates=(1e-3, 2e-3, 4e-3, 8e-3))
HIGHER = dict(SHORT, learning_rates=(2e-3, 4e-3, 8e-3, 1.6e-2))  # few steps for 50 classes
TEXT = dict(  # 200 steps of 1,024 tokens
    average_rank=8,
    dtype="bfloat16",
    batch_size=8,
    max_length=128,
    epochs=2,
    max_steps=200,
    trials=3,
    learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
)
ALL_ARMS = ("adarank", "uniform", "random", "reversed", "eva")
SMOLLM2 = "SmolLM2-135M, plain text, average rank 8, bfloat16"
TREC = "TREC with 50 classes, average rank"
TO_008 = "rates up to 0.008"  # what the page says: the sweep's choice does not stand three epochs
fine_trec = partial(trec, fine=True)
TRAINING = {
    "minilm-trec-r2": Experiment(f"MiniLM, {TREC} 2", minilm, fine_trec, HIGHER, 5, ALL_ARMS),
    "minilm-trec-r8": Experiment(
        f"MiniLM, {TREC} 8", minilm, fine_trec, dict(HIGHER, average_rank=8)
    ),
    "smollm2-text": Experiment(SMOLLM2, smollm2, mr_sentences, TEXT),
    "minilm-mr-r2": Experiment("MiniLM, MR, average rank 2", minilm, mr, SHORT, 5),
    "mpnet-trec-r2": Experiment(f"MPNet-base, {TREC} 2", mpnet, fine_trec, SHORT),
    "minilm-mr-r2-wide": Experiment(f"MiniLM, MR, average rank 2, {TO_008}", minilm, mr, WIDE, 5),
    "mpnet-trec-r2-wide": Experiment(f"MPNet-base, {TREC} 2, {TO_008}", mpnet, fine_trec, WIDE),
}
NAMES = (*study_plans.EXPERIMENTS, *TRAINING)


class Enough(Exception):
    """What was asked for is done; the rest is for another time."""


class Limit:
    """Hears of every finished run, and says when to stop: after so many seconds, if any."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began = seconds, time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
        if 0 < self.seconds < time.monotonic() - self.began:
            raise Enough


def train(name: str, experiment: Experiment, limit: Callable[[str], object]) -> None:
    """Run what is missing of a comparison, a seed after the other."""
    model, (train_data, held_out) = experiment.model(), experiment.data()
    for seeds in range(_finished(name) + 1, experiment.seeds + 1):
        asked = dict(experiment.options, arms=experiment.arms, seeds=seeds, title=experiment.title)
        report = ada.compare(
            model, train_data, held_out, work_dir=WORK / name, progress=limit, **asked
        )
        report.save(WORK / name)
        write_results("study", {name: {"seeds_planned": experiment.seeds, **small(report)}})
        print(report.table(), flush=True)


def small(report: Comparison) -> dict[str, Any]:
    """A report's results without the training curves, and each arm's ranks."""
    runs = [{k: v for k, v in run.items() if k != "curve"} for run in report.results["runs"]]
    ranks = {arm: list(plan.ranks.values()) for arm, plan in report.plans.items()}
    step = statistics.median(run["step_seconds"] for run in runs)
    return {"results": {**report.results, "runs": runs}, "ranks": ranks, "step_seconds": step}


def _finished(name: str) -> int:
    """Seeds that the results have."""
    row = read_results("study").get(name)
    return len(row["results"]["settings"]["seeds"]) if row else 0


def show() -> None:
    """Print every experiment and how much of it is done."""
    for name, experiment in TRAINING.items():
        done = f"{_finished(name)} of {experiment.seeds} seeds"
        print(f"{name:18} {done}: {experiment.title}")
    for name, title in study_plans.EXPERIMENTS.items():
        made, planned = study_plans.progress(name)
        print(f"{name:18} {made} of {planned} predictions: {title}")


def main() -> None:
    """Run what is not finished, in the order of `NAMES`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
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
    limit = Limit(60 * asked.minutes)
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
