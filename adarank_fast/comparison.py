"""Arms of one parameter budget, trained alike and held beside each other.

A comparison is a grid of cells: (arm, seed, learning rate). First every arm gets its learning rate,
the best of a few after one epoch on a validation split of the training data; then it is trained
with every seed on all of it and evaluated on held-out items. A finished cell lies as two files in
the comparison's folder and is not run again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from adarank_fast.adapters import inject
from adarank_fast.allocators import ALLOCATORS, Problem, allocate, check_budget
from adarank_fast.data import Item
from adarank_fast.plan import RankPlan, replacing
from adarank_fast.report import Comparison
from adarank_fast.statistics import METRICS, Metric, user_metric
from adarank_fast.subject import (
    Data,
    Subject,
    calibration,
    digest,
    digest_model,
    make_subject,
    split_validation,
    try_metric,
)
from adarank_fast.summary import summarise
from adarank_fast.targets import TargetModules
from adarank_fast.training import (
    Evaluation,
    Recipe,
    adapter_parameters,
    evaluate,
    fit,
    peak_memory,
    reset_peak_memory,
)

LEARNING_RATES = {"classification": (1e-3, 2e-3, 4e-3), "causal-lm": (2e-4, 5e-4, 1e-3)}


@dataclass(frozen=True)
class Cell:
    """One training run of the grid."""

    arm: str
    seed: int
    learning_rate: float
    sweep: bool

    @property
    def name(self) -> str:
        kind = "sweep" if self.sweep else "run"
        return f"{kind}-{self.arm}-seed{self.seed}-rate{self.learning_rate:g}"


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
        arms: names of `adarank_fast.allocators`, or plan files.
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
    probe = _make(subject, numbers[0])
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
        "model_digest": digest_model(probe),
        "train_digest": digest(subject.train),
        "held_out_digest": digest(subject.held_out),
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
            best = {arm: _best_rate(arm, swept, measure) or rates[0] for arm in plans}
            runs = []
            for turn, seed in enumerate(numbers):
                for arm in list(plans)[:: -1 if turn % 2 else 1]:  # in turns, as machines drift
                    runs.append(grid.result(Cell(arm, seed, best[arm], False)))
        evaluations = [None if run["diverged"] else grid.evaluation(run) for run in runs]
    return Comparison(summarise(settings, plans, swept, runs, evaluations, measure), plans)


class Grid:
    """Cells on disk: reads those that are finished, runs the others."""

    def __init__(
        self,
        folder: Path,
        subject: Subject,
        metric: Metric,
        recipe: Recipe,
        plans: dict[str, RankPlan],
        scaling: str | float,
    ) -> None:
        self.folder, self.subject, self.metric = folder / "cells", subject, metric
        self.recipe, self.plans, self.scaling = recipe, plans, scaling
        self.validation = split_validation(subject.train)
        self.on_step: Callable[[], object] = lambda: None
        self.say: Callable[[str], object] = lambda line: None

    def items(self, sweep: bool) -> tuple[Sequence[Item], Sequence[Item]]:
        """(to train on, to evaluate on)."""
        return self.validation if sweep else (self.subject.train, self.subject.held_out)

    def settings(self, cell: Cell) -> Recipe:
        epochs = 1 if cell.sweep else self.recipe.epochs
        rate = cell.learning_rate
        return replace(self.recipe, epochs=epochs, learning_rate=rate, seed=cell.seed)

    def result(self, cell: Cell) -> dict[str, Any]:
        """What came out of the cell, run now or before."""
        path = self.folder / f"{cell.name}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            for _ in range(result["steps"]):
                self.on_step()
            return result
        result, evaluation = self.run(cell)
        self.folder.mkdir(exist_ok=True)
        if evaluation is not None and not cell.sweep:
            with replacing(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
                numpy.savez_compressed(file, **vars(evaluation))
        text = json.dumps(result)
        with replacing(path) as temporary:  # the cell is finished when this file is there
            temporary.write_text(text, encoding="utf-8")
        value = result["diverged"] or f"{self.metric.name} {result['value']:.4g}"
        self.say(f"{cell.name}: {value}, {result['training_seconds']:.0f} s of training")
        return json.loads(text)  # as a resumed comparison reads it

    def evaluation(self, result: dict[str, Any]) -> Evaluation:
        """The held-out predictions of a finished run."""
        with numpy.load(self.folder / f"{result['name']}.npz") as arrays:
            return Evaluation(**arrays)

    def run(self, cell: Cell) -> tuple[dict[str, Any], Evaluation | None]:
        started, cpu_started = time.perf_counter(), time.process_time()
        train, held_out = self.items(cell.sweep)
        recipe, pad = self.settings(cell), self.subject.pad
        plan = self.plans[cell.arm]
        model = _make(self.subject, cell.seed)
        example = calibration(self.subject)[0]
        peft_model = inject(model, plan, self.scaling, example, **self.subject.lora_config)
        parameters = adapter_parameters(peft_model)
        assert parameters == plan.parameters
        reset_peak_memory()
        training = fit(peft_model, train, pad, recipe, on_step=self.on_step)
        memory = peak_memory()
        wrong = training.diverged
        evaluation = None
        if wrong is None:
            evaluation = evaluate(peft_model, held_out, pad, recipe.batch_size)
            loss = float(evaluation.losses.sum() / evaluation.counts.sum())
            if not math.isfinite(loss):
                wrong = f"held-out loss {loss}"
        return {
            "name": cell.name,
            **vars(cell),
            "diverged": wrong,
            "value": None if wrong or evaluation is None else self.metric.value(evaluation),
            "loss": None if wrong else loss,
            "first_loss": _json_number(training.losses[0]),
            "curve": [(step, _json_number(value)) for step, value in training.curve()],
            "parameters": parameters,
            "steps": len(training.losses),
            "step_seconds": statistics.median(training.seconds),
            "tokens_per_second": training.tokens / sum(training.seconds),
            "training_seconds": sum(training.seconds),
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "peak_memory_bytes": memory,
            "threads": torch.get_num_threads(),
        }, None if wrong else evaluation


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _make(subject: Subject, seed: int) -> nn.Module:
    """The untrained model; what is new in it, and what comes after, is drawn from the seed."""
    from transformers import set_seed

    set_seed(seed)
    model = subject.factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model() must return a torch module, got {type(model).__name__}")
    return model


def _best_rate(arm: str, swept: Sequence[dict[str, Any]], metric: Metric) -> float | None:
    """The rate with the best validation metric, ties to the lower loss; None: no sweep."""
    mine = [cell for cell in swept if cell["arm"] == arm]
    if not mine:
        return None
    sound = [cell for cell in mine if cell["diverged"] is None]
    if not sound:
        tried = ", ".join(f"{cell['learning_rate']:g}" for cell in mine)
        raise ValueError(
            f"arm {arm!r} diverged at every learning rate of the sweep ({tried}); give lower ones"
        )
    sign = -1 if metric.greater_is_better else 1
    return min(sound, key=lambda cell: (sign * cell["value"], cell["loss"]))["learning_rate"]


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
