"""Rank allocators: ways to share one parameter budget out over the same modules.

An allocator is a function of a `Problem` that returns a `RankPlan`; its name is the arm's. To add
one, write it here under `@allocator`: `adarank compare --arms` and `ada.compare` know it then.
"""

from __future__ import annotations

import random as random_numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from adarank_fast.errors import AdarankError
from adarank_fast.models.batches import prepare_batches
from adarank_fast.models.targets import find_targets
from adarank_fast.plan.allocation import allocate_ranks
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.prediction.predict import predict_ranks

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
    """

    model: nn.Module
    batches: Sequence[dict[str, Any]]
    uniform: RankPlan
    trials: int = 5
    seed: int = 0

    @cached_property
    def adarank(self) -> RankPlan:
        """AdaRank's plan, predicted once; `settings["seconds"]` is what it cost."""
        started = time.perf_counter()
        plan = predict_ranks(
            self.model,
            self.batches,
            budget_parameters=self.uniform.parameters,
            target_modules=self.uniform.settings["target_modules"],
            trials=self.trials,
            seed=self.seed,
            progress=False,
        )
        plan.settings["seconds"] = time.perf_counter() - started
        return plan

    def within_budget(self, weights: Mapping[str, float], **settings: Any) -> RankPlan:
        """Ranks as they are if they spend the budget exactly, else in proportion to them."""
        plan = replace(self.uniform, settings={**self.uniform.settings, **settings})
        ranks = {name: int(weight) for name, weight in weights.items()}
        asked = replace(plan, ranks=ranks)
        if ranks == dict(weights) and asked.parameters == self.uniform.parameters:
            return asked
        ranks = allocate_ranks(weights, sizes=plan.sizes, budget_parameters=self.uniform.parameters)
        return replace(plan, ranks=ranks)


ALLOCATORS: dict[str, Callable[[Problem], RankPlan]] = {}


def allocator(function: Callable[[Problem], RankPlan]) -> Callable[[Problem], RankPlan]:
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
    """AdaRank's ranks dealt out at random: as uneven, but not by disagreement."""
    ranks = list(problem.adarank.ranks.values())
    random_numbers.Random(problem.seed).shuffle(ranks)
    return _dealt_out(problem, ranks, "random")


@allocator
def reversed(problem: Problem) -> RankPlan:
    """AdaRank's ranks in reverse order: the highest rank to the module that earned the lowest."""
    names = list(problem.adarank.ranks)
    scores = problem.adarank.scores
    order = sorted(names, key=lambda name: (scores[name].mean, name))
    by_score = [problem.adarank.ranks[name] for name in order]
    turned = dict(zip(order, by_score[::-1], strict=True))
    return _dealt_out(problem, [turned[name] for name in names], "reversed")


def _dealt_out(problem: Problem, ranks: Sequence[int], allocation: str) -> RankPlan:
    """Other modules, same ranks: scaled to the budget where modules are of different sizes."""
    weights = dict(zip(problem.adarank.ranks, ranks, strict=True))
    seconds = problem.adarank.settings["seconds"]
    return problem.within_budget(weights, allocation=allocation, seconds=seconds)


EVA_RHO = 2.0  # PEFT's default: no module gets more than twice the uniform rank


@allocator
def eva(problem: Problem) -> RankPlan:
    """PEFT's EVA (arXiv 2410.07170): rank where the inputs' principal components explain most.

    Only the ranks are taken, from `peft.tuners.lora.eva`; A starts as in every other arm.
    """
    from peft import EvaConfig, LoraConfig, get_eva_state_dict

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
    found = find_targets(problem.model, problem.uniform.settings["target_modules"])
    targets = {target.path: target.name for target in found}
    config = LoraConfig(
        r=rank,
        target_modules=list(targets),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=EVA_RHO, use_label_mask=False),
    )
    vectors = get_eva_state_dict(problem.model, batches, config, show_progress_bar=False)
    ranks = {targets[path]: len(mine) for path, mine in vectors.items()}
    weights = {name: ranks.get(name, 0) for name in problem.uniform.ranks}
    return problem.within_budget(weights, allocation="eva", rho=EVA_RHO)


def allocate(name: str, problem: Problem) -> RankPlan:
    """The plan of an arm: an allocator's, with its time in `settings["seconds"]`, or a file's.

    Raises:
        AdarankError: `name` is neither an allocator nor a plan file; or another model's plan.
    """
    if name in ALLOCATORS:
        started = time.perf_counter()
        plan = ALLOCATORS[name](problem)
        seconds = time.perf_counter() - started
        return replace(plan, settings={"seconds": seconds, **plan.settings})
    if not name.endswith(".json"):
        raise AdarankError(
            f"arm {name!r} is unknown; use one of {', '.join(ALLOCATORS)} or a plan file (.json)"
        )
    return RankPlan.load(name)


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
