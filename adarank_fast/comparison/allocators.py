"""Rank allocators: ways to share one parameter budget out over the same modules.

An allocator is a function of a `Problem` that returns a `RankPlan`; its name is the arm's. Those
here are known by name. Others are given to `ada.compare(arms=...)` as functions, named as
`module:function`, or installed as entry points of the group `adarank.allocators`.
"""

from __future__ import annotations

import random as random_numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from adarank_fast.errors import AdarankError, AdarankTypeError
from adarank_fast.options import find_function
from adarank_fast.plan.allocation import allocate_ranks

if TYPE_CHECKING:
    from adarank_fast.models.batches import Batch

if TYPE_CHECKING:  # the names of arms are judged before torch is imported
    from torch import nn

    from adarank_fast.plan.rank_plan import RankPlan

TOLERANCE = 0.01  # by which arms' parameters may differ from the uniform arm's


@dataclass
class Problem:
    """What an allocator may look at.

    Attributes:
        model: untrained and without adapters.
        batches: calibration inputs, without labels.
        uniform: the uniform arm's plan: modules, their sizes, and the budget.
        trials: perturbations of each module.
        seed: of whatever is random.
        labelled: the same inputs with their labels.
        progress: show a bar on stderr.
    """

    model: nn.Module
    batches: Sequence[Batch]
    uniform: RankPlan
    trials: int = 5
    seed: int = 0
    labelled: Sequence[Batch] = ()
    progress: bool = False

    @property
    def budget(self) -> int:
        """Adapter parameters that a plan may spend."""
        return self.uniform.parameters

    @property
    def targets(self) -> dict[str, str]:
        """Name in `model.named_modules()` -> name in a plan, of each module that gets a rank."""
        from adarank_fast.models.targets import find_targets

        found = find_targets(self.model, self.uniform.settings["target_modules"])
        return {target.path: target.name for target in found}

    @cached_property
    def adarank(self) -> RankPlan:
        """AdaRank's plan, predicted once; `settings["seconds"]` is what it cost."""
        from adarank_fast.prediction.predict import predict_ranks

        started = time.perf_counter()
        plan = predict_ranks(
            self.model,
            self.batches,
            budget_parameters=self.uniform.parameters,
            target_modules=self.uniform.settings["target_modules"],
            expert_rank=self.uniform.settings.get("expert_rank", "whole"),
            trials=self.trials,
            seed=self.seed,
            progress=self.progress,
        )
        plan.settings["seconds"] = time.perf_counter() - started
        return plan

    def within_budget(self, weights: Mapping[str, float], **settings: object) -> RankPlan:
        """A plan of these ranks if they spend the budget exactly, else of ranks scaled to it."""
        plan = replace(self.uniform, settings={**self.uniform.settings, **settings})
        ranks = {name: int(weight) for name, weight in weights.items()}
        asked = replace(plan, ranks=ranks)
        if ranks == dict(weights) and asked.parameters == self.budget:
            return asked
        ranks = allocate_ranks(
            weights, sizes=plan.sizes, experts=plan.experts, budget_parameters=self.budget
        )
        return replace(plan, ranks=ranks)


Allocator = Callable[[Problem], "RankPlan"]
ALLOCATORS: dict[str, Allocator] = {}
GROUP = "adarank.allocators"  # of entry points


def allocator(function: Allocator) -> Allocator:
    """Register a function as the arm of its name."""
    ALLOCATORS[function.__name__] = function
    return function


@allocator
def adarank(problem: Problem) -> RankPlan:
    """Ranks in proportion to the disagreement that a module's perturbation causes."""
    return problem.adarank


@allocator
def uniform(problem: Problem) -> RankPlan:
    """The same rank everywhere: ordinary LoRA."""
    return problem.uniform


@allocator
def random(problem: Problem) -> RankPlan:
    """AdaRank's ranks, assigned to the modules at random instead of by disagreement."""
    ranks = list(problem.adarank.ranks.values())
    random_numbers.Random(problem.seed).shuffle(ranks)
    return _dealt_out(problem, ranks, "random")


@allocator
def reversed(problem: Problem) -> RankPlan:
    """AdaRank's ranks in reverse order: the highest rank to the module that earned the lowest."""
    ranks, scores = problem.adarank.ranks, problem.adarank.scores
    order = sorted(ranks, key=lambda name: (scores[name].mean, name))
    turned = {name: ranks[other] for name, other in zip(order, order[::-1], strict=True)}
    return _dealt_out(problem, [turned[name] for name in ranks], "reversed")


def _dealt_out(problem: Problem, ranks: Sequence[int], allocation: str) -> RankPlan:
    """A plan of the same ranks on other modules; scaled to the budget if it is not met."""
    weights = dict(zip(problem.adarank.ranks, ranks, strict=True))
    seconds = problem.adarank.settings["seconds"]
    return problem.within_budget(weights, allocation=allocation, seconds=seconds)


EVA_RHO = 2.0  # PEFT's default: no module gets more than twice the uniform rank


@allocator
def eva(problem: Problem) -> RankPlan:
    """PEFT's EVA (arXiv 2410.07170): ranks by the variance that the inputs' components explain.

    Only the ranks are taken, from `peft.tuners.lora.eva`; A starts as in every other arm.
    """
    from peft import EvaConfig, LoraConfig, get_eva_state_dict
    from torch import Tensor

    from adarank_fast.models.batches import prepare_batches

    if experts := [*problem.uniform.experts]:
        raise AdarankError(
            f"eva ranks layers by their inputs, and {experts[0]} is a parameter of experts; leave "
            'the arm out, or compare with target_modules="attention"'
        )
    rank = max(problem.uniform.ranks.values())
    batches = [
        {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        for batch in prepare_batches(problem.model, problem.batches)
    ]
    most = round(rank * EVA_RHO)
    if any(batch["attention_mask"].sum() < most for batch in batches):
        raise AdarankError(
            f"eva at rank {rank} needs at least {most} tokens in every calibration batch; give "
            "more or longer texts"
        )
    targets = problem.targets
    config = LoraConfig(
        r=rank,
        target_modules=list(targets),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=EVA_RHO, use_label_mask=False),
    )
    vectors = get_eva_state_dict(problem.model, batches, config, show_progress_bar=problem.progress)
    ranks = {targets[path]: len(mine) for path, mine in vectors.items()}
    weights = {name: ranks.get(name, 0) for name in problem.uniform.ranks}
    return problem.within_budget(weights, allocation="eva", rho=EVA_RHO)


def find_allocator(arm: str | Allocator) -> tuple[str, Allocator]:
    """The arm's name in the report, and its allocator; a plan file's reads the file.

    Args:
        arm: a function; a name of `ALLOCATORS` or of an entry point; `module:function`; or a plan
            file, which is called by its name without .json.

    Raises:
        AdarankError: `arm` is none of these.
    """
    if not isinstance(arm, str):
        return getattr(arm, "__name__", type(arm).__name__), arm
    if arm in ALLOCATORS:
        return arm, ALLOCATORS[arm]
    if arm.endswith(".json"):
        return Path(arm).stem, lambda problem: load_plan(arm)
    if (found := find_function("arm", arm, GROUP)) is not None:
        return arm.partition(":")[2] or arm, found
    raise AdarankError(
        f"arm {arm!r} is unknown; use {', '.join(ALLOCATORS)}, a plan file (.json) or "
        "module:function"
    )


def load_plan(file: str) -> RankPlan:
    """The plan of a plan file."""
    from adarank_fast.plan.rank_plan import RankPlan

    return RankPlan.load(file)


def allocate(arm: str | Allocator, problem: Problem) -> RankPlan:
    """The plan of an arm, with its time in `settings["seconds"]`; a plan file's as it is."""
    from adarank_fast.plan.rank_plan import RankPlan

    name, function = find_allocator(arm)
    started = time.perf_counter()
    plan = function(problem)
    seconds = time.perf_counter() - started
    if not isinstance(plan, RankPlan):
        raise AdarankTypeError(f"arm {name!r} must return a RankPlan, got {type(plan).__name__}")
    if is_plan_file(arm):
        return plan
    return replace(plan, settings={"seconds": seconds, **plan.settings})


def is_plan_file(arm: str | Allocator) -> bool:
    """True if the arm is a file and not a function."""
    return isinstance(arm, str) and arm not in ALLOCATORS and arm.endswith(".json")


def check_budget(plans: Mapping[str, RankPlan], budget: int) -> None:
    """Refuse plans whose parameters differ from the budget by more than `TOLERANCE` of it."""
    for arm, plan in plans.items():
        off = plan.parameters / budget - 1
        if abs(off) > TOLERANCE:
            raise AdarankError(
                f"arm {arm!r} has {plan.parameters:,} adapter parameters, {off:+.1%} of uniform's "
                f"{budget:,}; arms may differ by {TOLERANCE:.0%}: make a plan file with "
                f"budget_parameters={budget}, or raise the average rank"
            )
