"""Arms of one parameter budget, trained alike and held beside each other.

A comparison is a grid of cells: (arm, seed, learning rate). First every arm gets its learning rate,
the best of a few after one epoch on a validation split of the training data; then it is trained
with every seed on all of it and evaluated on held-out items. A finished cell lies as two files in
the comparison's folder and is not run again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
from torch import nn

from adarank_fast.comparison.allocators import ALLOCATORS, Problem, allocate, check_budget
from adarank_fast.comparison.experiment import (
    Data,
    calibration,
    make_subject,
    try_metric,
)
from adarank_fast.comparison.grid import Cell, Grid, best_rate, make_model
from adarank_fast.comparison.metrics import METRICS, user_metric
from adarank_fast.comparison.report import Comparison
from adarank_fast.comparison.results import summarise
from adarank_fast.files import replacing
from adarank_fast.models.identity import digest_data, digest_weights
from adarank_fast.models.targets import TargetModules
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.training.trainer import Recipe

LEARNING_RATES = {"classification": (1e-3, 2e-3, 4e-3), "causal-lm": (2e-4, 5e-4, 1e-3)}


def compare(
    model: str | os.PathLike[str] | Callable[[], nn.Module],
    train_data: Data,
    eval_data: Data | None = None,
    arms: Sequence[str] = ("adarank", "uniform"),
    seeds: int | Sequence[int] = 3,
    *,
    average_rank: int = 8,
    target_modules: TargetModules = "attention",
    task: str = "auto",
    metric: Callable[[numpy.ndarray, numpy.ndarray], float] | None = None,
    greater_is_better: bool = True,
    learning_rates: Sequence[float] | None = None,
    epochs: int = 3,
    max_steps: int | None = None,
    batch_size: int = 32,
    max_length: int = 128,
    scaling: str | float = "constant",
    trials: int = 5,
    tokenizer: Any = None,
    modules_to_save: Sequence[str] | None = None,
    dtype: str = "float32",
    title: str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[str], object] = True,
) -> Comparison:
    """Train rank allocators under one parameter budget, with several seeds, and compare them.

    Args:
        model: a folder or hub name; or a function without arguments that makes the untrained model
            (it is called under the seed; the model takes items as keywords and returns "loss" and
            "logits").
        train_data: a file, `TextData`, (text, label) pairs, texts, or tokenised items (dicts of
            lists, labels included).
        eval_data: held-out data, likewise. None: a fifth of the training data is held out.
        arms: names of `adarank_fast.comparison.allocators`, or plan files.
        seeds: how many, from 0; or the seeds.
        average_rank: of uniform LoRA, whose number of parameters is every arm's budget.
        target_modules: see `find_targets`.
        task: "classification", "causal-lm", or "auto": classification if the data have labels.
        metric: None: accuracy or perplexity. Else a function of predictions and labels that returns
            a number: logits [N, C] and labels [N], or for language models the likeliest tokens [M]
            and the true ones [M].
        greater_is_better: of your metric; it decides between learning rates.
        learning_rates: tried for each arm, one epoch, the first seed; a single one is taken as is.
            None: `LEARNING_RATES`.
        epochs, max_steps, batch_size: see `Recipe`.
        max_length: tokens of a text at most; of a language model's blocks exactly.
        scaling: see `inject`; the same for all arms.
        trials: perturbations of each module, for AdaRank.
        tokenizer: for texts where `model` is a function.
        modules_to_save: modules trained in full beside the adapters where `model` is a function.
        dtype: of the frozen weights, where `model` is a name.
        title: heads the report.
        work_dir: plans and finished cells are kept there and not made again. None: nowhere.
        progress: say on stderr what is done. A function gets a line after each run instead; an
            exception that it raises ends the comparison, with that run kept.

    Returns:
        The report: `.table()`, `.save(folder)`, `.results`.

    Raises:
        ValueError, TypeError: one line that names the argument, its value and the remedy. What is
            known beforehand is said before anything is trained.
    """
    numbers = _seeds(seeds)
    subject = make_subject(
        model, train_data, eval_data, task, tokenizer, modules_to_save, max_length, dtype
    )
    measure = METRICS[subject.task] if metric is None else user_metric(metric, greater_is_better)
    try_metric(measure, subject)
    rates = LEARNING_RATES[subject.task] if learning_rates is None else tuple(learning_rates)
    if not rates or len(set(rates)) < len(rates):
        raise ValueError(f"learning_rates must be different numbers, got {list(rates)}")
    recipe = Recipe(epochs, batch_size, min(rates), numbers[0], max_steps)
    labels = _labels(arms)
    probe = make_model(subject, numbers[0])
    uniform = RankPlan.uniform(probe, average_rank, target_modules)
    settings = {
        "title": title or f"{subject.name}, {subject.task}",
        "task": subject.task,
        "classes": subject.classes,
        "train_items": len(subject.train),
        "held_out_items": len(subject.held_out),
        "metric": measure.name,
        "greater_is_better": measure.greater_is_better,
        "average_rank": average_rank,
        "budget_parameters": uniform.parameters,
        "target_modules": uniform.settings["target_modules"],
        "learning_rates": list(rates),
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "max_length": max_length,
        "scaling": scaling,
        "trials": trials,
        "dtype": dtype,
        "sweep_seed": numbers[0],
        "model_digest": digest_weights(probe),
        "train_digest": digest_data(subject.train),
        "held_out_digest": digest_data(subject.held_out),
        "versions": {n: version(n) for n in ("adarank-fast", "torch", "transformers", "peft")},
    }
    with _folder(work_dir) as folder:
        settings["date"] = _claim(folder, settings)
        problem = Problem(probe, calibration(subject), uniform, trials)
        plans = {label: _plan(folder, label, arm, problem) for label, arm in labels.items()}
        check_budget(plans, uniform.parameters)
        grid = Grid(folder, subject, measure, recipe, plans, scaling)
        sweep = [Cell(arm, numbers[0], r, True) for arm in plans for r in rates if len(rates) > 1]
        with _progress(grid, sweep, len(plans) * len(numbers), progress):
            swept = [grid.result(cell) for cell in sweep]
            best = {arm: best_rate(arm, swept, measure) or rates[0] for arm in plans}
            runs = []
            for turn, seed in enumerate(numbers):
                for arm in list(plans)[:: -1 if turn % 2 else 1]:  # in turns, as machines drift
                    runs.append(grid.result(Cell(arm, seed, best[arm], False)))
        evaluations = [None if run["diverged"] else grid.evaluation(run) for run in runs]
    return Comparison(summarise(settings, plans, swept, runs, evaluations, measure), plans)


def _plan(folder: Path, label: str, arm: str, problem: Problem) -> RankPlan:
    """The arm's plan, from the comparison's folder if it is there."""
    path = folder / "plans" / f"{label}.json"
    if not path.exists():
        plan = allocate(arm, problem)
        path.parent.mkdir(exist_ok=True)
        plan.save(path)
    plan = RankPlan.load(path)
    if arm not in ALLOCATORS and RankPlan.load(arm).ranks != plan.ranks:
        raise ValueError(
            f"plan {arm!r} has changed since its arm was trained in {str(folder)!r}; give the plan "
            "another name or the comparison another folder"
        )
    return plan


def _labels(arms: Sequence[str]) -> dict[str, str]:
    """Arm's name in the report -> arm; a plan file is called by its name without .json."""
    if isinstance(arms, str) or not arms:
        raise ValueError(f"arms must be a list of at least one name, got {arms!r}")
    named = [arm if arm in ALLOCATORS else Path(arm).stem for arm in map(str, arms)]
    if double := [name for name in named if named.count(name) > 1]:
        raise ValueError(f"two arms are called {double[0]!r}; name every arm once")
    for arm, name in zip(arms, named, strict=True):
        if arm not in ALLOCATORS:
            if name in ALLOCATORS:
                raise ValueError(f"plan file {arm!r} is called like an allocator; rename it")
            if not str(arm).endswith(".json"):
                raise ValueError(
                    f"arm {arm!r} is unknown; use {', '.join(ALLOCATORS)} or a plan file (.json)"
                )
            RankPlan.load(arm)
    return dict(zip(named, map(str, arms), strict=True))


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    good = all(isinstance(seed, int) and seed >= 0 for seed in numbers)
    if not numbers or not good or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"seeds must be a positive number or different numbers of at least 0, got {seeds!r}"
        )
    return numbers


@contextmanager
def _folder(work_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    if work_dir is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    folder = Path(work_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"work_dir {str(folder)!r} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"work_dir {str(folder)!r} cannot be written; name another folder")
    yield folder


def _claim(folder: Path, settings: dict[str, Any]) -> str:
    """Note the settings of a new comparison, or check that they are those of the one in `folder`.

    Arms and seeds are not among them: they can be added. Where no run is finished yet, the old
    settings and plans give way. Returns the date of the first start.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not (path.exists() and (folder / "cells").exists()):
        if path.exists():
            shutil.rmtree(folder / "plans", ignore_errors=True)
        settings["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return settings["date"]
    before = json.loads(path.read_text(encoding="utf-8"))
    if odd := [key for key in settings if before.get(key) != settings[key]]:
        raise ValueError(
            f"{str(folder)!r} holds a comparison with {odd[0]} = {before.get(odd[0])!r}, now "
            f"{settings[odd[0]]!r}; name another folder or delete that one"
        )
    return before["date"]


@contextmanager
def _progress(
    grid: Grid, sweep: Sequence[Cell], runs: int, wanted: bool | Callable[[str], object]
) -> Iterator[None]:
    """A bar over training steps on a terminal; a line a cell anywhere, or to a function."""
    from tqdm import tqdm

    steps = sum(replace(grid.recipe, epochs=1).steps(len(grid.validation[0])) for _ in sweep)
    steps += runs * grid.recipe.steps(len(grid.subject.train))
    if callable(wanted):
        grid.say = wanted
        yield
        return
    with tqdm(total=steps, disable=not (wanted and sys.stderr.isatty()), leave=False) as bar:
        grid.on_step = lambda: bar.update()
        if wanted:
            grid.say = lambda line: bar.write(line, file=sys.stderr)
        yield
