"""The grid of training runs: which are finished on disk, and running the others."""

from __future__ import annotations

import json
import math
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast
from zipfile import BadZipFile

import numpy
import torch
from torch import nn

from adarank_fast.adapters.inject import inject
from adarank_fast.comparison.experiment import (
    Experiment,
    calibration,
    split_validation,
)
from adarank_fast.comparison.folder import CELLS
from adarank_fast.comparison.metrics import Metric
from adarank_fast.comparison.numbers import CellNumbers, SweptNumbers
from adarank_fast.errors import AdarankError, AdarankTypeError
from adarank_fast.files import replacing, write_text
from adarank_fast.models.memory import peak_memory, reset_peak_memory
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.training.evaluation import Evaluation, evaluate
from adarank_fast.training.tokens import Item
from adarank_fast.training.trainer import Recipe, adapter_parameters, fit


@dataclass(frozen=True)
class Cell:
    """One training run of the grid."""

    arm: str
    seed: int
    learning_rate: float
    sweep: bool

    @property
    def name(self) -> str:
        """The stem of the cell's files."""
        kind = "sweep" if self.sweep else "run"
        return f"{kind}-{self.arm}-seed{self.seed}-rate{float(self.learning_rate)!r}"


class Grid:
    """Cells on disk: reads those that are finished, runs the others."""

    def __init__(
        self,
        folder: Path,
        experiment: Experiment,
        metric: Metric,
        recipe: Recipe,
        plans: dict[str, RankPlan],
        scaling: str | float,
    ) -> None:
        self.folder, self.experiment, self.metric = folder / CELLS, experiment, metric
        self.recipe, self.plans, self.scaling = recipe, plans, scaling
        self.validation = split_validation(experiment.train)
        self.on_step: Callable[[], object] = lambda: None
        self.say: Callable[[str], object] = lambda line: None

    def items(self, sweep: bool) -> tuple[Sequence[Item], Sequence[Item]]:
        """(to train on, to evaluate on)."""
        return self.validation if sweep else (self.experiment.train, self.experiment.held_out)

    def settings(self, cell: Cell) -> Recipe:
        """The recipe with the cell's seed and learning rate; one epoch in a sweep."""
        epochs = 1 if cell.sweep else self.recipe.epochs
        rate = cell.learning_rate
        return replace(self.recipe, epochs=epochs, learning_rate=rate, seed=cell.seed)

    def result(self, cell: Cell) -> CellNumbers:
        """What came out of the cell, run now or before."""
        path = self.folder / f"{cell.name}.json"
        if path.exists():
            result = _read(path)
            for _ in range(result["steps"]):
                self.on_step()
            return result
        result, evaluation = self.run(cell)
        self.folder.mkdir(exist_ok=True)
        if evaluation is not None and not cell.sweep:
            with replacing(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
                numpy.savez_compressed(file, **vars(evaluation))
        text = json.dumps(result)
        write_text(path, text)  # the cell is finished when this file is there
        value = result["diverged"] or f"{self.metric.name} {result['value']:.4g}"
        self.say(f"{cell.name}: {value}, {result['training_seconds']:.0f} s of training")
        return cast(CellNumbers, json.loads(text))  # as a resumed comparison reads it

    def evaluation(self, result: CellNumbers) -> Evaluation:
        """The held-out predictions of a finished run."""
        path = self.folder / f"{result['name']}.npz"
        try:
            with numpy.load(path) as arrays:
                return Evaluation(**arrays)
        except (OSError, ValueError, TypeError, BadZipFile, zlib.error):
            raise _damaged(path) from None

    def run(self, cell: Cell) -> tuple[CellNumbers, Evaluation | None]:
        """Train the cell's adapter and measure it.

        Returns:
            What goes into its JSON file, and the evaluation; None if the loss diverged.
        """
        started, cpu_started = time.perf_counter(), time.process_time()
        train, held_out = self.items(cell.sweep)
        recipe, pad = self.settings(cell), self.experiment.pad
        plan = self.plans[cell.arm]
        model = make_model(self.experiment, cell.seed)
        example = calibration(self.experiment)[0]
        peft_model = inject(model, plan, self.scaling, example, **self.experiment.lora_config)
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
            "arm": cell.arm,
            "seed": cell.seed,
            "learning_rate": cell.learning_rate,
            "sweep": cell.sweep,
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


def _read(path: Path) -> CellNumbers:
    """The result in a cell's file, if it belongs to that cell."""
    try:
        result = cast(CellNumbers, dict(json.loads(path.read_text(encoding="utf-8"))))
        if result["name"] != path.stem or not 0 < result["steps"] == int(result["steps"]):
            raise ValueError("another cell")
        return result
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise _damaged(path) from None


def _damaged(path: Path) -> AdarankError:
    return AdarankError(f"{str(path)!r} is damaged; delete that cell's files to run it again")


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def make_model(experiment: Experiment, seed: int) -> nn.Module:
    """The untrained model. Its new weights and all later random numbers come from the seed."""
    from transformers import set_seed

    set_seed(seed)
    model = experiment.factory()
    if not isinstance(model, nn.Module):
        raise AdarankTypeError(f"model() must return a torch module, got {type(model).__name__}")
    return model


def best_rate(arm: str, swept: Sequence[SweptNumbers], metric: Metric) -> float | None:
    """The rate with the best validation metric, ties to the lower loss; None: no sweep."""
    mine = [cell for cell in swept if cell["arm"] == arm]
    if not mine:
        return None
    sound = [cell for cell in mine if cell["diverged"] is None]
    if not sound:
        tried = ", ".join(f"{cell['learning_rate']:g}" for cell in mine)
        raise AdarankError(
            f"arm {arm!r} diverged at every learning rate of the sweep ({tried}); give lower ones"
        )
    sign = -1 if metric.greater_is_better else 1
    ranked = [
        (sign * cell["value"], cell["loss"], cell["learning_rate"])
        for cell in sound
        if cell["value"] is not None and cell["loss"] is not None
    ]
    return float(min(ranked, key=lambda one: one[:2])[2])
