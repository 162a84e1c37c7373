"""The fields of results.json and of a cell's file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict


class IntervalNumbers(TypedDict):
    """See `statistics.Interval`."""

    mean: float
    low: float | None
    high: float | None
    count: int
    p_value: float | None


class SweptNumbers(TypedDict):
    """A cell of the sweep; of one that diverged, `value` and `loss` are None."""

    arm: str
    learning_rate: float
    value: float | None
    loss: float | None
    diverged: str | None


class CellNumbers(SweptNumbers):
    """All that is kept of a training run; times in seconds."""

    name: str
    seed: int
    sweep: bool
    first_loss: float | None
    curve: Sequence[tuple[int, float | None]]
    parameters: int
    steps: int
    step_seconds: float
    tokens_per_second: float
    training_seconds: float
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int | None
    threads: int


class ArmNumbers(TypedDict):
    """An arm over its seeds; `value` is None if one of its runs diverged."""

    parameters: int
    learning_rate: float
    rate_at_the_edge: bool
    by_seed: dict[str, float | None]
    diverged: dict[str, str]
    value: IntervalNumbers | None
    seeds_disagree: dict[str, float]
    step_seconds: float
    tokens_per_second: float
    prediction_seconds: float | None
    peak_memory_bytes: int | None
    lowest_rank: int
    highest_rank: int


class DifferenceNumbers(TypedDict):
    """An arm minus the baseline, paired by seed and by item."""

    by_seed: dict[str, float]
    seeds: IntervalNumbers
    items: IntervalNumbers | None


class Settings(TypedDict):
    """What was compared, and how."""

    title: str
    date: str
    task: str
    classes: int | None
    train_items: int
    held_out_items: int
    metric: str
    metric_function: list[object] | None
    greater_is_better: bool
    average_rank: int
    expert_rank: NotRequired[str]
    budget_parameters: int
    target_modules: object
    learning_rates: list[float]
    epochs: int
    max_steps: int | None
    batch_size: int
    max_length: int
    scaling: str | float
    trials: int
    dtype: str
    modules_to_save: Sequence[str] | None
    seeds: list[int]
    sweep_seed: int
    train_digest: str
    held_out_digest: str
    model_digest: str
    versions: dict[str, str]


class Machine(TypedDict):
    """What it ran on."""

    system: str
    device: str
    threads: list[int]
    python: str


class Results(TypedDict):
    """results.json; `differences` has None for an arm that diverged or whose baseline did."""

    format: str
    schema: int
    settings: Settings
    machine: Machine
    baseline: str
    arms: dict[str, ArmNumbers]
    differences: dict[str, DifferenceNumbers | None]
    items_are: str
    sweep: list[SweptNumbers]
    runs: list[CellNumbers]
    training_seconds: float
    cell_seconds: float
    cell_cpu_seconds: float
