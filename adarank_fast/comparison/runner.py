"""Running a comparison.

It is a grid of cells: (arm, seed, learning rate). First every arm gets its learning rate, the best
of a few after one epoch on a validation split of the training data; then it is trained with every
seed on all of it and evaluated on held-out items. A finished cell lies as two files in the
comparison's folder and is not run again.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from adarank_fast.comparison.allocators import Problem, check_budget
from adarank_fast.comparison.design import Design
from adarank_fast.comparison.experiment import Experiment, calibration, try_metric
from adarank_fast.comparison.folder import COMPARISON, arm_plan, claim
from adarank_fast.comparison.grid import Cell, Grid, best_rate, make_model
from adarank_fast.comparison.metrics import METRICS, Metric, user_metric
from adarank_fast.comparison.report import Comparison
from adarank_fast.comparison.results import summarise
from adarank_fast.files import own_folder
from adarank_fast.models.identity import digest_data, digest_weights, qualified_name
from adarank_fast.models.targets import TargetModules
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.training.trainer import Recipe


def run(
    design: Design,
    experiment: Experiment,
    target_modules: TargetModules,
    title: str | None,
    work_dir: str | os.PathLike[str] | None,
    progress: bool | Callable[[str], object],
) -> Comparison:
    """Allocate, train what is not trained yet, and sum up; see `compare`."""
    for file in design.plan_files:
        RankPlan.load(file)  # refuses what is no plan, before the work
    task, seeds, labels = experiment.task, design.all_seeds, design.labels
    metric = METRICS[task]
    if design.metric is not None:
        metric = user_metric(design.metric, design.greater_is_better)
    settings = _settings(design, experiment, metric)
    model = make_model(experiment, seeds[0])
    uniform = RankPlan.uniform(model, design.average_rank, target_modules, design.expert_rank)
    settings |= {
        "title": title or f"{experiment.name}, {task}",
        "budget_parameters": uniform.parameters,
        "target_modules": uniform.settings["target_modules"],
        "model_digest": digest_weights(model),
    }
    recipe = Recipe(design.epochs, design.batch_size, seed=seeds[0], max_steps=design.max_steps)
    with _folder(work_dir) as folder:
        settings["date"] = claim(folder, settings)
        problem = Problem(
            model,
            calibration(experiment),
            uniform,
            design.trials,
            labelled=calibration(experiment, labels=True),
            progress=bool(progress) and sys.stderr.isatty(),
        )
        plans = {label: arm_plan(folder, label, arm, problem) for label, arm in labels.items()}
        check_budget(plans, uniform.parameters)
        grid = Grid(folder, experiment, metric, recipe, plans, design.scaling)
        rates = design.rates(task)
        sweep = [Cell(arm, seeds[0], r, True) for arm in plans for r in rates if len(rates) > 1]
        with _progress(grid, sweep, len(plans) * len(seeds), progress):
            swept = [grid.result(cell) for cell in sweep]
            best = {arm: best_rate(arm, swept, metric) or rates[0] for arm in plans}
            runs = []
            for turn, seed in enumerate(seeds):
                for arm in list(plans)[:: -1 if turn % 2 else 1]:  # in turns, as machines drift
                    runs.append(grid.result(Cell(arm, seed, best[arm], False)))
        evaluations = [None if run["diverged"] else grid.evaluation(run) for run in runs]
    return Comparison(summarise(settings, plans, swept, runs, evaluations, metric), plans)


def _settings(design: Design, experiment: Experiment, metric: Metric) -> dict[str, object]:
    """What the cells depend on, as far as the model need not be made for it."""
    of_metric = None
    if design.metric is not None:  # a function of the same name is not the same function
        of_metric = [qualified_name(design.metric), try_metric(metric, experiment)]
    return {
        "task": experiment.task,
        "classes": experiment.classes,
        "train_items": len(experiment.train),
        "held_out_items": len(experiment.held_out),
        "metric": metric.name,
        "metric_function": of_metric,
        "greater_is_better": metric.greater_is_better,
        "average_rank": design.average_rank,
        "expert_rank": design.expert_rank,
        "learning_rates": list(design.rates(experiment.task)),
        "epochs": design.epochs,
        "max_steps": design.max_steps,
        "batch_size": design.batch_size,
        "max_length": design.max_length,
        "scaling": design.scaling,
        "trials": design.trials,
        "dtype": design.dtype,
        "modules_to_save": experiment.lora_config.get("modules_to_save"),
        "sweep_seed": design.all_seeds[0],
        "train_digest": digest_data(experiment.train),
        "held_out_digest": digest_data(experiment.held_out),
        "versions": {n: version(n) for n in ("adarank-fast", "torch", "transformers", "peft")},
    }


@contextmanager
def _folder(work_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    if work_dir is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    with own_folder(work_dir, COMPARISON) as folder:
        yield folder


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
