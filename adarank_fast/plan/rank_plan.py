"""A rank for every module: `RankPlan`, its JSON file, its table, and the PEFT config it becomes."""

from __future__ import annotations

import difflib
import html
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from adarank_fast.errors import AdarankError, printable
from adarank_fast.files import write_text
from adarank_fast.json_values import MOST, Value, said
from adarank_fast.models.targets import (
    Target,
    TargetModules,
    find_candidates,
    find_targets,
    unwrap,
)
from adarank_fast.models.text import data_frame
from adarank_fast.options import (
    DEFAULT_TARGETS,
    check_choice,
    check_number,
    gather,
    refuse_unknown,
)
from adarank_fast.plan.allocation import (
    Experts,
    SharedBudget,
    allocate_ranks,
    expert_divisor,
    highest_rank,
)
from adarank_fast.plan.budget import ALLOCATIONS, EXPERT_RANKS, Budget, BudgetOptions
from adarank_fast.plan.lora_config import lora_config
from adarank_fast.plan.table import plan_table
from adarank_fast.plan.uncertainty import chance_of_change

if TYPE_CHECKING:
    import pandas
    from peft import LoraConfig

FORMAT = "adarank-fast plan"
SCHEMA = 1  # raise it whenever an older release would misread the file


@dataclass(frozen=True)
class Score:
    """One module's disagreement over the trials.

    Attributes:
        mean: of the trials; what ranks are proportional to.
        std: sample standard deviation (n - 1) of the trials; 0.0 for a single trial.
        trials: the disagreement of each trial.
    """

    mean: float
    std: float
    trials: tuple[float, ...]

    @classmethod
    def from_trials(cls, trials: Sequence[float]) -> Score:
        """A score of at least one trial.

        Raises:
            AdarankError: there is none.
        """
        values = tuple(float(value) for value in trials)
        if not values:
            raise AdarankError("trials is empty; a score needs at least one trial")
        mean = statistics.fmean(values)
        std = math.hypot(*(value - mean for value in values)) / math.sqrt(max(len(values) - 1, 1))
        return cls(mean, std, values)


@dataclass(frozen=True, repr=False)
class RankPlan:
    """How much rank each module gets, and why.

    Attributes:
        ranks: canonical module name (as in the bare base model) -> rank; 0: no adapter.
        sizes: name -> (in_features, out_features).
        scores: name -> `Score`; empty for plans that no probing made.
        settings: everything needed to make the plan again. `"base_model_prefix"`, such as
            "bert.", is what task models put in front of the names; `"experts"` says of each 3-D
            parameter how many experts it has and how many of them are active for a token (0: not
            known). The rank of such a parameter is that of each expert, its size that of all
            experts side by side.
    """

    ranks: dict[str, int]
    sizes: dict[str, tuple[int, int]]
    scores: dict[str, Score] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.ranks:
            raise AdarankError("ranks is empty; a plan needs at least one module")
        if self.ranks.keys() != self.sizes.keys():
            odd = sorted(self.ranks.keys() ^ self.sizes.keys())
            raise AdarankError(f"ranks and sizes name different modules, for example {odd[0]}")
        if not self.scores.keys() <= self.ranks.keys():
            odd = sorted(self.scores.keys() - self.ranks.keys())
            raise AdarankError(f"scores has a module that ranks lacks: {odd[0]}")
        for name, rank in self.ranks.items():
            if rank < 0:
                raise AdarankError(f"ranks must not be negative, got {rank} for {name}")
            if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
                raise AdarankError(
                    f"the module name {name!r} has half of a surrogate pair, which no file can "
                    "hold; rename the module"
                )

    @property
    def parameters(self) -> int:
        """Adapter parameters the plan spends: the sum of rank * (in + out), over all experts."""
        return sum(rank * sum(self.sizes[name]) for name, rank in self.ranks.items())

    @property
    def experts(self) -> dict[str, Experts]:
        """Of the plan's 3-D parameters: name -> (experts, experts active for a token or 0)."""
        said = self.settings.get("experts")
        if said is None:  # a plan of an older release has no more than their names
            said = dict.fromkeys(self.settings.get("expert_parameters", ()), (1, 0))
        return {name: Experts(*said[name]) for name in self.ranks if name in said}

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        rank: int = 8,
        target_modules: TargetModules = DEFAULT_TARGETS,
        expert_rank: str = "whole",
    ) -> RankPlan:
        """The same rank for every target module: ordinary LoRA.

        Args:
            model: any torch module.
            rank: of every module.
            target_modules: see `find_targets`.
            expert_rank: "whole": every expert gets `rank` too. "divided": `rank` / experts active
                for a token, rounded down, at least 1.

        Raises:
            AdarankError: `rank` is below 1 or more than a module can hold; see also `find_targets`.
        """
        rank = check_number("rank", rank)
        check_choice("expert_rank", expert_rank, EXPERT_RANKS)
        if not isinstance(target_modules, str):
            target_modules = sorted(target_modules)
        targets = find_targets(model, target_modules)
        settings = {
            **describe_model(model, targets),
            "allocation": "uniform",
            "average_rank": rank,
            "expert_rank": expert_rank,
            "target_modules": target_modules,
            "versions": {"adarank-fast": version("adarank-fast")},
        }
        experts = settings.get("experts", {})
        ranks, sizes = {}, {}
        for target in targets:
            name = target.name
            sizes[name] = (target.in_features, target.out_features)
            ranks[name] = max(1, rank // expert_divisor(name, experts, expert_rank))
            if ranks[name] > highest_rank(name, sizes[name], experts):
                one = [size // target.experts for size in sizes[name]]
                raise AdarankError(
                    f"rank={rank} exceeds min(in, out) of {name} {one}; lower it or leave the "
                    "module out"
                )
        return cls(ranks=ranks, sizes=sizes, settings=settings)

    def allocate(
        self, budget: Budget | float | None = None, **options: Unpack[BudgetOptions]
    ) -> RankPlan:
        """A new plan that spends another budget on the same scores, without probing.

        Args:
            budget: a `Budget`, or a number: the average rank.
            options: the fields of `Budget` as keywords, instead of `budget`.

        Raises:
            AdarankError: the plan has no scores; or as `allocate_ranks`.
        """
        if not self.scores:
            raise AdarankError(
                "this plan has no scores to allocate by (it was not made by probing); "
                "run predict_ranks"
            )
        flat: dict[str, object] = {**options}
        budget = gather(Budget, budget, flat)
        refuse_unknown(self.allocate, flat, Budget)
        means = {name: score.mean for name, score in self.scores.items()}
        ranks = allocate_ranks(means, budget, self.sizes, self.experts)
        return RankPlan(ranks, self.sizes, self.scores, {**self.settings, **budget.options})

    def _budget(self) -> SharedBudget | None:
        """What the ranks were shared out of; None if `allocate_ranks` did not make them.

        Raises:
            AdarankError: the settings do not say a budget that the modules can have.
        """
        if self.settings.get("allocation") not in ALLOCATIONS:
            return None
        known = {key: self.settings[key] for key in Budget().options if key in self.settings}
        return SharedBudget(Budget(**known), self.ranks, self.sizes, self.experts)

    def chance_of_change(self) -> dict[str, float] | None:
        """For each module, the chance that another seed of the noise gives it another rank.

        See `uncertainty.chance_of_change`. None if the trials cannot tell: one trial of
        each module, or a plan that no probing made.
        """
        budget = self._budget()
        if self.scores.keys() != self.ranks.keys() or budget is None:
            return None
        trials = {name: score.trials for name, score in self.scores.items()}
        if not any(map(any, trials.values())):
            return None
        return chance_of_change(trials, self.ranks, budget.ranks)

    def to_lora_config(
        self, scaling: str | float = "constant", **lora_config_kwargs: Any
    ) -> LoraConfig:
        """The plan as a `peft.LoraConfig`, for code that calls PEFT itself.

        It fits the bare base model and, through `settings["base_model_prefix"]`, its task models.
        `inject` resolves and checks the names against the model; prefer it where you can.

        Args:
            scaling: what lora_alpha / rank is: "constant" (2 for every module; a number sets
                another constant), "paper" (8 / rank) or "rslora" (8 / sqrt(rank)).
            lora_config_kwargs: other `LoraConfig` arguments, such as lora_dropout, bias, task_type,
                modules_to_save. A plan for Conv1D modules (GPT-2) needs fan_in_fan_out=True.

        Raises:
            AdarankError: all ranks are 0, unknown scaling, or an argument the plan itself decides.
        """
        from peft import LoraConfig

        refuse_unknown(self.to_lora_config, lora_config_kwargs, LoraConfig)
        prefix = self.settings.get("base_model_prefix", "")
        of_model = bool(self.settings.get("expert_parameters"))
        return lora_config(
            self.ranks, scaling, prefix, self.experts, of_model, **lora_config_kwargs
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, modules in the plan's order; never a half-written file."""
        content = {
            "format": FORMAT,
            "schema": SCHEMA,
            "ranks": self.ranks,
            "sizes": self.sizes,
            "scores": {
                name: {"mean": score.mean, "std": score.std, "trials": score.trials}
                for name, score in self.scores.items()
            },
            "settings": dict(sorted(self.settings.items())),
        }
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
        write_text(path, text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankPlan:
        """Read a plan that `save` wrote.

        Raises:
            AdarankFileNotFoundError: there is no such file.
            AdarankError: it cannot be read, is not a plan, is damaged, or a newer release wrote it.
        """
        return read_plan(path)

    def __getitem__(self, name: str) -> int:
        """The rank of a module."""
        if name not in self.ranks:
            near = difflib.get_close_matches(str(name), self.ranks, 1, 0.3)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise AdarankError(f"the plan has no module {printable(str(name))!r}{meant}")
        return self.ranks[name]

    def __repr__(self) -> str:
        ranks = self.ranks.values()
        return (
            f"RankPlan({len(ranks)} modules, ranks {min(ranks)} to {max(ranks)}, "
            f"{self.parameters:,} parameters); .table() shows it"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"

    def to_frame(self) -> pandas.DataFrame:
        """A pandas DataFrame, a row for each module: rank, sizes, parameters, score.

        Raises:
            AdarankImportError: pandas is not installed.
        """
        rows = {}
        for name, rank in self.ranks.items():
            fan_in, fan_out = self.sizes[name]
            row: dict[str, float] = {"rank": rank, "in_features": fan_in, "out_features": fan_out}
            row["parameters"] = rank * (fan_in + fan_out)
            if self.experts:
                row["experts"] = self.experts[name].total if name in self.experts else 1
            if score := self.scores.get(name):
                row |= {"disagreement": score.mean, "std": score.std, "trials": len(score.trials)}
            rows[name] = row
        return data_frame(rows)

    def table(self) -> str:
        """The plan as text of at most 80 columns, without colours: a line for each module.

        "may change" is the chance that another seed gives another rank (see `chance_of_change`).
        Where there is no room, sizes are left out and names go on in a second line. Of experts,
        "8 of 64 x 32" says that the rank is each of 8 experts'.
        """
        return plan_table(self)


def read_plan(path: str | os.PathLike[str]) -> RankPlan:
    """See `RankPlan.load`."""
    remedy = "make the plan again with predict_ranks or `adarank predict`"
    content = Value.read(path, "plan", remedy)
    if not isinstance(content.value, dict) or content.value.get("format") != FORMAT:
        raise AdarankError(f"{str(path)!r} is JSON but no adarank-fast plan; {remedy}")
    schema = content.value.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise AdarankError(
            f"plan {str(path)!r} has schema {said(schema)}, this release reads up to {SCHEMA}; "
            "upgrade adarank-fast"
        )
    sizes = {}
    for name, size in content["sizes"].items():
        both = size.list()
        if len(both) != 2:
            raise size.damaged(f"{said(size.value)}, not [in_features, out_features]")
        sizes[name] = (both[0].integer(1), both[1].integer(1))
    ranks = {
        name: rank.integer(0, min(sizes.get(name, (MOST,))))
        for name, rank in content["ranks"].items()
    }
    scores = {name: _read_score(score) for name, score in content["scores"].items()}
    settings = content["settings"]
    for key in ("base_model_prefix", "metric", "model", "model_class", "allocation"):
        if (text := settings.get(key)) is not None:
            text.text()
    if (parameters := settings.get("expert_parameters")) is not None:
        for parameter in parameters.list():
            parameter.text()
    if (experts := settings.get("experts")) is not None:
        for _, expert in experts.items():
            both = expert.list()
            if len(both) != 2:
                raise expert.damaged(f"{said(expert.value)}, not [experts, active experts]")
            both[0].integer(1), both[1].integer(0)
    try:
        plan = RankPlan(ranks, sizes, scores, settings.mapping())
        plan._budget()
    except AdarankError as error:
        raise AdarankError(f"plan {str(path)!r} is damaged: {error}; {remedy}") from None
    return plan


def _read_score(score: Value) -> Score:
    trials = tuple(trial.number() for trial in score["trials"].list())
    if not trials:
        raise score["trials"].damaged("empty; a score needs at least one trial")
    return Score(score["mean"].number(), score["std"].number(), trials)


def describe_model(model: nn.Module, targets: Iterable[Target]) -> dict[str, Any]:
    """What a plan's settings say about the model and the targets it was made on."""
    inner = unwrap(model)
    prefix = getattr(inner, "base_model_prefix", "")
    experts = {
        target.name: [*Experts(target.experts, target.experts_per_token or 0)]
        for target in targets
        if target.parameter
    }
    of_model = [target.name for target in find_candidates(inner) if target.parameter]
    return {
        **({"expert_parameters": of_model} if of_model else {}),
        **({"experts": experts} if experts else {}),
        "model_class": type(inner).__name__,
        "model": getattr(getattr(inner, "config", None), "_name_or_path", "") or "",
        "base_model_prefix": f"{prefix}." if prefix else "",
    }
