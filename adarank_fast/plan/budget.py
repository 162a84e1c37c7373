"""A rank budget's options: names, defaults, checks and help texts. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TypedDict

from adarank_fast.errors import AdarankError
from adarank_fast.options import RANGES, check_choice, check_number, option

ALLOCATIONS = ("exact", "paper")
EXPERT_RANKS = ("whole", "divided")
DEFAULT_AVERAGE_RANK = 8
EXPERT_RANK_HELP = (
    'Of each expert of an MoE layer: "whole", or "divided": rank / active experts '
    "(num_experts_per_tok), rounded, at least 1."
)


@dataclass(frozen=True)
class Budget:
    """How much rank there is to share out, and within which bounds.

    Attributes:
        average_rank: floor(average_rank * number of modules) ranks. None: 8, unless there is
            another budget.
        budget_parameters: this many adapter parameters, rank * (in + out) a module. At most one of
            the two.
        min_rank: no module gets less; 0 lets a module go without an adapter.
        max_rank: no module gets more.
        rank_multiple: every rank is a multiple of it (min_rank is rounded up, max_rank down).
        allocation: "exact": after rounding down, steps of `rank_multiple` go to the largest
            remainders (ties by name) until no step is affordable: an average-rank budget divisible
            by the multiple is spent exactly, otherwise less than the cheapest step stays unspent.
            "paper": rounding down only, as published; spends less than the budget.
        expert_rank: of a parameter that holds the weights of all experts of a layer. "whole": every
            expert gets the rank that the parameter's disagreement earns, as any module does.
            "divided": that rank / k, where k experts are active for a token (num_experts_per_tok);
            rounded as `allocation` says, at least 1. A rank of it then counts as k in an average
            rank: a token passes through k experts. `min_rank`, `max_rank` and `rank_multiple` bound
            the rank of each expert. A budget in parameters counts all experts either way.

    Raises:
        AdarankError: one line that names the option, its value and the remedy.
    """

    average_rank: float | None = option(
        None, "Budget: average rank of a module.", shown=str(DEFAULT_AVERAGE_RANK)
    )
    budget_parameters: int | None = option(
        None, "Budget: number of adapter parameters, instead of --average-rank."
    )
    min_rank: int = option(0, "The smallest rank.")
    max_rank: int | None = option(None, "The largest rank.")
    rank_multiple: int = option(1, "Ranks are multiples of it.")
    allocation: str = option("exact", '"exact" spends the whole budget, "paper" rounds down.')
    expert_rank: str = option("whole", EXPERT_RANK_HELP)

    def __post_init__(self) -> None:
        if self.average_rank is not None and self.budget_parameters is not None:
            raise AdarankError(
                f"average_rank={self.average_rank} and budget_parameters={self.budget_parameters} "
                "are both given; keep one of them"
            )
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in RANGES and value is not None:
                object.__setattr__(self, one.name, check_number(one.name, value))
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise AdarankError(
                f"max_rank={self.max_rank} is below min_rank={self.min_rank}; raise max_rank"
            )
        check_choice("allocation", self.allocation, ALLOCATIONS)
        check_choice("expert_rank", self.expert_rank, EXPERT_RANKS)

    @property
    def options(self) -> dict[str, object]:
        """The options by name, as `RankPlan.settings` keeps them."""
        return asdict(self)


class BudgetOptions(TypedDict, total=False):
    """The options of `Budget` as keywords, for type checkers."""

    average_rank: float | None
    budget_parameters: int | None
    min_rank: int
    max_rank: int | None
    rank_multiple: int
    allocation: str
    expert_rank: str
