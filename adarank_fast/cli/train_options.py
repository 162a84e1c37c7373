"""Options of `adarank train`: where the ranks come from, and how the run goes. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from adarank_fast.errors import AdarankError
from adarank_fast.options import RANGES, check_choice, check_number, option
from adarank_fast.plan.budget import DEFAULT_AVERAGE_RANK, EXPERT_RANK_HELP, EXPERT_RANKS


@dataclass(frozen=True)
class Ranks:
    """Where the ranks come from: a plan, one rank for all modules, or a prediction.

    Attributes:
        plan: a plan file.
        average_rank: of a prediction. None: `DEFAULT_AVERAGE_RANK`.
        rank: of uniform LoRA.
        expert_rank: of the last two; see `Budget`.

    Raises:
        AdarankError: more than one is given, `expert_rank` is unknown or beside a plan, or a number
            is out of its range.
    """

    plan: Path | None = option(None, "Plan file with the ranks; default: they are predicted first.")
    average_rank: float | None = option(
        None, "Average of the predicted ranks.", shown=str(DEFAULT_AVERAGE_RANK)
    )
    rank: int | None = option(None, "Train uniform LoRA of this rank instead.")
    expert_rank: str = option("whole", EXPERT_RANK_HELP)

    def __post_init__(self) -> None:
        given = [n for n in ("plan", "average_rank", "rank") if getattr(self, n) is not None]
        if len(given) > 1:
            names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise AdarankError(f"{names} each set the ranks; give one of them")
        check_choice("expert_rank", self.expert_rank, EXPERT_RANKS)
        if self.plan is not None and self.expert_rank != "whole":
            raise AdarankError(
                f"expert_rank={self.expert_rank!r} is for predicted or uniform ranks; a plan says "
                "the rank of each expert"
            )
        _check_numbers(self)


@dataclass(frozen=True)
class Settings:
    """How the run goes: fields of `TrainingArguments` or `SFTConfig`, by flag, file or pair.

    Attributes:
        epochs, max_steps, batch_size, learning_rate, max_length, seed: see `arguments.FLAGS`.
        early_stopping: stop after this many evaluations without gain, and keep the best weights.
        config: a file of fields.
        pairs: "name=value" each.

    Raises:
        AdarankError: a number is out of its range.
    """

    epochs: int | None = option(None, "Passes over the data.", shown="3")
    max_steps: int | None = option(None, "Stop after this many steps.")
    batch_size: int | None = option(None, "Examples per step.", shown="32; language models 8")
    learning_rate: float | None = option(
        None, "The highest learning rate of the run.", shown="1e-3; language models 2e-4"
    )
    max_length: int | None = option(
        None,
        "Use at most this many tokens of an example.",
        shown="128; language models 1024",
    )
    seed: int | None = option(
        None, "Seed of a new head, the adapters, the order and dropout.", shown="0"
    )
    early_stopping: int | None = option(
        None, "Stop after this many evaluations without gain; keep the best weights."
    )
    config: Path | None = option(
        None, "YAML or JSON file of TrainingArguments (language models: SFTConfig)."
    )
    pairs: Sequence[str] | None = option(
        None,
        "One such field, name=value. May be given several times.",
        flag="set",
        kind=list[str] | None,
    )

    def __post_init__(self) -> None:
        _check_numbers(self)

    def fields(self, task: str) -> Mapping[str, object]:
        """All fields that are not the libraries' defaults; see `read_settings`."""
        from adarank_fast.training.arguments import FLAGS, read_settings

        flags = {name: getattr(self, name) for name in FLAGS}
        found = read_settings(task, self.config, flags, self.pairs or ())
        if self.early_stopping is not None:
            found = {"load_best_model_at_end": True, **found}
        if found.get("load_best_model_at_end"):  # Trainer's own default is to evaluate never
            found = {"eval_strategy": "steps", "eval_steps": found["save_steps"], **found}
        return found


def _check_numbers(options: Ranks | Settings) -> None:
    for one in fields(options):
        value = getattr(options, one.name)
        if one.name in RANGES and value is not None:
            object.__setattr__(options, one.name, check_number(one.name, value))
