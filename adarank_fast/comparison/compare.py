"""Arms of one parameter budget, trained alike and held beside each other.

A comparison is a grid of cells: (arm, seed, learning rate). First every arm gets its learning rate,
the best of a few after one epoch on a validation split of the training data; then it is trained
with every seed on all of it and evaluated on held-out items. A finished cell lies as two files in
the comparison's folder and is not run again.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy
from torch import nn

from adarank_fast.comparison.allocators import (
    ALLOCATORS,
    Allocator,
    Problem,
    allocate,
    check_budget,
    find_allocator,
    is_plan_file,
)
from adarank_fast.comparison.experiment import (
    Data,
    calibration,
    make_experiment,
    try_metric,
)
from adarank_fast.comparison.grid import Cell, Grid, best_rate, make_model
from adarank_fast.comparison.metrics import METRICS, user_metric
from adarank_fast.comparison.report import Comparison
from adarank_fast.comparison.results import summarise
from adarank_fast.errors import AdarankError
from adarank_fast.files import note_settings
from adarank_fast.models.identity import digest_data, digest_weights
from adarank_fast.models.targets import TargetModules
from adarank_fast.options import (
    DTYPES,
    RANGES,
    TASKS,
    check_choice,
    check_integer,
    check_number,
    shown,
)
from adarank_fast.plan.lora_config import alpha_rule
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.training.trainer import Recipe

LEARNING_RATES = {"classification": (1e-3, 2e-3, 4e-3), "causal-lm": (2e-4, 5e-4, 1e-3)}


def compare(
    model: str | os.PathLike[str] | Callable[[], nn.Module],
    train_data: Data,
    eval_data: Data | None = None,
    arms: Sequence[str | Allocator] = ("adarank", "uniform"),
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
        arms: names of `adarank_fast.comparison.allocators`, plan files, or allocators of your own:
            functions, `module:function`, or entry points; see `find_allocator`.
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
        AdarankError: one line that names the argument, its value and the remedy. Arguments
            are judged before anything is loaded, all else before anything is trained.
    """
    numbers, labels = _seeds(seeds), _labels(arms)
    recipe = Recipe(epochs, batch_size, seed=numbers[0], max_steps=max_steps)
    for rate in learning_rates or ():
        replace(recipe, learning_rate=rate)  # refuses what is no rate
    if learning_rates is not None and not 0 < len(learning_rates) == len(set(learning_rates)):
        raise AdarankError(f"learning_rates must be different numbers, got {list(learning_rates)}")
    check_integer("average_rank", average_rank, 1)
    check_number("max_length", max_length)
    check_number("trials", trials)
    check_choice("task", task, ("auto", *TASKS))
    check_choice("dtype", dtype, DTYPES)
    alpha_rule(scaling)
    if work_dir is not None:
        check_work_dir(work_dir)
    experiment = make_experiment(
        model, train_data, eval_data, task, tokenizer, modules_to_save, max_length, dtype
    )
    measure = METRICS[experiment.task] if metric is None else user_metric(metric, greater_is_better)
    try_metric(measure, experiment)
    rates = LEARNING_RATES[experiment.task] if learning_rates is None else tuple(learning_rates)
    probe = make_model(experiment, numbers[0])
    uniform = RankPlan.uniform(probe, average_rank, target_modules)
    settings = {
        "title": title or f"{experiment.name}, {experiment.task}",
        "task": experiment.task,
        "classes": experiment.classes,
        "train_items": len(experiment.train),
        "held_out_items": len(experiment.held_out),
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
        "train_digest": digest_data(experiment.train),
        "held_out_digest": digest_data(experiment.held_out),
        "versions": {n: version(n) for n in ("adarank-fast", "torch", "transformers", "peft")},
    }
    with _folder(work_dir) as folder:
        settings["date"] = _note_settings(folder, settings)
        problem = Problem(
            probe,
            calibration(experiment),
            uniform,
            trials,
            labelled=calibration(experiment, labels=True),
            progress=bool(progress) and sys.stderr.isatty(),
        )
        plans = {label: _plan(folder, label, arm, problem) for label, arm in labels.items()}
        check_budget(plans, uniform.parameters)
        grid = Grid(folder, experiment, measure, recipe, plans, scaling)
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


def _plan(folder: Path, label: str, arm: str | Allocator, problem: Problem) -> RankPlan:
    """The arm's plan, from the comparison's folder if it is there."""
    path = folder / "plans" / f"{label}.json"
    if not path.exists():
        plan = allocate(arm, problem)
        path.parent.mkdir(exist_ok=True)
        plan.save(path)
    plan = RankPlan.load(path)
    if is_plan_file(arm) and RankPlan.load(str(arm)).ranks != plan.ranks:
        raise AdarankError(
            f"plan {arm!r} has changed since its arm was trained in {str(folder)!r}; give the plan "
            "another name or the comparison another folder"
        )
    return plan


def _labels(arms: Sequence[str | Allocator]) -> dict[str, str | Allocator]:
    """Arm's name in the report -> arm."""
    if isinstance(arms, str) or not arms:
        raise AdarankError(f"arms must be a list of at least one name, got {arms!r}")
    arms = [os.fspath(arm) if isinstance(arm, os.PathLike) else arm for arm in arms]
    named = [find_allocator(arm)[0] for arm in arms]
    for arm, name in zip(arms, named, strict=True):
        if arm != name and name in ALLOCATORS:
            what = "plan file" if is_plan_file(arm) else "allocator"
            raise AdarankError(f"{what} {arm!r} is called like an allocator; rename it")
        if is_plan_file(arm):
            RankPlan.load(str(arm))
    if double := [name for name in named if named.count(name) > 1]:
        raise AdarankError(f"two arms are called {double[0]!r}; name every arm once")
    return dict(zip(named, arms, strict=True))


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    if seeds in RANGES["seeds"]:
        return list(range(cast(int, seeds)))
    numbers = list(seeds) if isinstance(seeds, Sequence) and not isinstance(seeds, str) else []
    good = all(seed in RANGES["seed"] for seed in numbers)
    if not numbers or not good or len(set(numbers)) < len(numbers):
        raise AdarankError(
            "seeds must be a positive number or different numbers of at least 0, got "
            f"{shown(seeds)}"
        )
    return numbers


@contextmanager
def _folder(work_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    if work_dir is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    folder = Path(work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def check_work_dir(folder: str | os.PathLike[str]) -> None:
    """Refuse what is no folder and cannot be made one, and what cannot be written."""
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise AdarankError(f"work_dir {str(there)!r} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise AdarankError(f"work_dir {str(there)!r} cannot be written; name another folder")


def _note_settings(folder: Path, settings: dict[str, Any]) -> str:
    """See `note_settings`. Where no run is finished yet, the old settings and plans give way.

    Arms and seeds are not among the settings: they can be added.
    """
    noted = folder / "settings.json"
    if noted.exists() and not (folder / "cells").exists():
        noted.unlink()
        shutil.rmtree(folder / "plans", ignore_errors=True)
    remedy = "name another folder or delete that one"
    return note_settings(folder, settings, "a comparison", remedy)


@contextmanager
def _progress(
    grid: Grid, sweep: Sequence[Cell], runs: int, wanted: bool | Callable[[str], object]
) -> Iterator[None]:
    """A bar over training steps on a terminal; a line a cell anywhere, or to a function."""
    from tqdm import tqdm

    steps = sum(replace(grid.recipe, epochs=1).steps(len(grid.validation[0])) for _ in sweep)
    steps += runs * grid.recipe.steps(len(grid.experiment.train))
    if callable(wanted):
        grid.say = wanted
        yield
        return
    with tqdm(total=steps, disable=not (wanted and sys.stderr.isatty()), leave=False) as bar:
        grid.on_step = lambda: bar.update()
        if wanted:
            grid.say = lambda line: bar.write(line, file=sys.stderr)
        yield
