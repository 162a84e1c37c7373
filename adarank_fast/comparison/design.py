"""The design of a comparison: options and their checks. No torch here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from adarank_fast.comparison.allocators import (
    ALLOCATORS,
    Allocator,
    find_allocator,
    is_plan_file,
)
from adarank_fast.errors import AdarankError, AdarankFileNotFoundError
from adarank_fast.options import (
    DTYPES,
    RANGES,
    TASKS,
    check_choice,
    check_integer,
    check_number,
    find_function,
    option,
    parse_numbers,
    parse_scaling,
    shown,
)
from adarank_fast.plan.budget import EXPERT_RANK_HELP, EXPERT_RANKS
from adarank_fast.plan.lora_config import alpha_rule

if TYPE_CHECKING:
    import numpy

DEFAULT_ARMS = ("adarank", "uniform")
LEARNING_RATES = {"classification": (1e-3, 2e-3, 4e-3), "causal-lm": (2e-4, 5e-4, 1e-3)}

METRICS = "adarank.metrics"  # group of entry points


@dataclass(frozen=True)
class Design:
    """What a comparison trains, how often, and what the runs are judged by.

    Attributes:
        arms: names of `adarank_fast.comparison.allocators`, plan files, or allocators of your own:
            functions, `module:function`, or entry points; see `find_allocator`. None: "adarank" and
            "uniform".
        seeds: how many, from 0; or the seeds.
        average_rank: of uniform LoRA, whose number of parameters is every arm's budget.
        expert_rank: of every arm; see `Budget`. With "divided" each expert of uniform LoRA has
            average_rank / active experts, rounded down, at least 1.
        task: "classification", "causal-lm", or "auto": classification if the data have labels.
        metric: None: accuracy or perplexity. Else a name, `module:function` or an entry point of
            `adarank.metrics`, or a function of predictions and labels that returns
            a number: logits [N, C] and labels [N], or for language models the likeliest tokens [M]
            and the true ones [M].
        greater_is_better: whether a greater value of your metric is better; it also decides
            between learning rates.
        learning_rates: each arm trains one epoch with each of them, with the first seed, and keeps
            the best; a single one is used without a trial. None: `LEARNING_RATES`.
        epochs, max_steps, batch_size: see `Recipe`.
        max_length: tokens of a text at most; of a language model's blocks exactly.
        scaling: see `inject`; the same for all arms.
        trials: perturbations of each module, for AdaRank.
        dtype: of the frozen weights, where the model is given by its name.

    Raises:
        AdarankError: one line that names the option, its value and the remedy.
    """

    arms: Sequence[str | Allocator] | None = option(
        None,
        f"{', '.join(ALLOCATORS)}, plan files or module:function, separated by commas.",
        shown=",".join(DEFAULT_ARMS),
        kind=str | None,
        parse=lambda text: [arm.strip() for arm in text.split(",") if arm.strip()],
    )
    seeds: int | Sequence[int] = option(3, "Training runs of each arm.", kind=int)
    average_rank: int = option(
        8, "Rank of uniform LoRA; its parameter count is every arm's budget."
    )
    expert_rank: str = option("whole", EXPERT_RANK_HELP)
    task: str = option("auto", f"auto (classification if there are labels), {' or '.join(TASKS)}.")
    metric: Callable[[numpy.ndarray, numpy.ndarray], float] | None = option(
        None,
        "Your own metric: module:function, called with predictions and labels.",
        shown="accuracy, perplexity",
        kind=str | None,
    )
    greater_is_better: bool = option(
        True,
        "A smaller value of your --metric is better.",
        shown=False,
        flag="smaller_is_better",
        kind=bool,
        parse=lambda smaller: not smaller,
        typed=False,
    )
    learning_rates: Sequence[float] | None = option(
        None,
        "Rates to try for each arm, separated by commas.",
        shown="by the task",
        kind=str | None,
        parse=partial(parse_numbers, "--learning-rates"),
    )
    epochs: int = option(3, "Passes over the training data.")
    max_steps: int | None = option(None, "Stop after this many steps.")
    batch_size: int = option(32, "Examples per step.")
    max_length: int = option(128, "Tokens of a text at most; of a language model's block exactly.")
    scaling: str | float = option(
        "constant",
        "lora_alpha / rank: constant (2), paper (8 / rank), rslora, or a number.",
        kind=str,
        parse=parse_scaling,
    )
    trials: int = option(5, "Perturbations of each module, for adarank.")
    dtype: str = option("float32", f"Type of the frozen weights: {', '.join(DTYPES)}.")

    def __post_init__(self) -> None:
        self._check_arms()
        seeds = self.all_seeds
        if not seeds or isinstance(self.seeds, bool) or not _are_seeds(seeds):
            raise AdarankError(
                "seeds must be a positive number or different numbers of at least 0 and below "
                f"2**32, got {shown(self.seeds)}"
            )
        check_integer("average_rank", self.average_rank, 1)
        for name in ("epochs", "batch_size", "max_length", "trials", "max_steps"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_number(name, value))
        check_choice("task", self.task, ("auto", *TASKS))
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("expert_rank", self.expert_rank, EXPERT_RANKS)
        if self.metric is not None and not callable(self.metric):
            given: object = self.metric
            found = find_function("metric", given, METRICS) if isinstance(given, str) else None
            if found is None:
                raise AdarankError(f"metric must be a function or module:function, got {given!r}")
            object.__setattr__(self, "metric", found)
        if self.learning_rates is not None:
            rates = list(self.learning_rates)
            numbers = all(rate in RANGES["learning_rate"] for rate in rates)
            if not numbers or not 0 < len(rates) == len(set(rates)):
                raise AdarankError(
                    f"learning_rates must be different numbers of at least 0, got {rates}"
                )
        alpha_rule(self.scaling)

    @property
    def all_seeds(self) -> Sequence[int]:
        """The seeds, one for each run of an arm."""
        if self.seeds in RANGES["seeds"]:
            return range(cast(int, self.seeds))
        listed = isinstance(self.seeds, Sequence) and not isinstance(self.seeds, str)
        return list(cast(Sequence[int], self.seeds)) if listed else []

    @property
    def labels(self) -> dict[str, str | Allocator]:
        """Arm's name in the report -> arm."""
        given = DEFAULT_ARMS if self.arms is None else self.arms
        arms = [os.fspath(arm) if isinstance(arm, os.PathLike) else arm for arm in given]
        return {find_allocator(arm)[0]: arm for arm in arms}

    @property
    def plan_files(self) -> list[str]:
        """The arms that are plan files."""
        return [arm for arm in self.labels.values() if isinstance(arm, str) and is_plan_file(arm)]

    def rates(self, task: str) -> tuple[float, ...]:
        """The learning rates to try."""
        return tuple(LEARNING_RATES[task] if self.learning_rates is None else self.learning_rates)

    def _check_arms(self) -> None:
        arms = DEFAULT_ARMS if self.arms is None else self.arms
        if isinstance(arms, str) or not arms:
            raise AdarankError(f"arms must be a list of at least one name, got {arms!r}")
        named = [find_allocator(os.fspath(a) if isinstance(a, os.PathLike) else a)[0] for a in arms]
        if double := [name for name in named if named.count(name) > 1]:
            raise AdarankError(f"two arms are called {double[0]!r}; name every arm once")
        for name, arm in self.labels.items():
            if arm != name and name in ALLOCATORS:
                what = "plan file" if is_plan_file(arm) else "allocator"
                raise AdarankError(f"{what} {arm!r} is called like an allocator; rename it")
            if "/" in name or "\0" in name:
                raise AdarankError(f"arm {name!r} cannot name a file; rename it")
        for file in self.plan_files:
            if not Path(file).is_file():
                raise AdarankFileNotFoundError(f"there is no plan file {file!r}; name another")


def _are_seeds(numbers: Sequence[int]) -> bool:
    """Whether they are different, and random number generators take them."""
    good = all(number in RANGES["seed"] for number in numbers)
    return good and len(set(numbers)) == len(numbers)


class DesignOptions(TypedDict, total=False):
    """Options of `Design` as keywords, for type checkers; `arms` and `seeds` are arguments."""

    average_rank: int
    expert_rank: str
    task: str
    metric: Callable[[numpy.ndarray, numpy.ndarray], float] | None
    greater_is_better: bool
    learning_rates: Sequence[float] | None
    epochs: int
    max_steps: int | None
    batch_size: int
    max_length: int
    scaling: str | float
    trials: int
    dtype: str
