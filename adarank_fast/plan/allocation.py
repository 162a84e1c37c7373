"""Share a rank budget out over modules in proportion to their disagreement. No torch here.

Module m has score d_m, bounds lo_m <= r_m <= hi_m, a divisor k_m and a cost per rank c_m: k_m when
the budget is an average rank, in + out when it is a number of parameters. The divisor is 1, but for
experts with `expert_rank="divided"`: there it is the number of experts active for a token, and
lo_m >= 1. The real-valued solution is

    x_m = clamp(lambda * d_m / k_m, lo_m, hi_m),   lambda such that  sum_m c_m x_m = budget,

so that what capped modules cannot take goes to the others. Without bounds this is the rule of
AdaRank (arXiv 2408.09015), k_m x_m = total_rank * d_m / sum d. Ranks are x_m rounded down; "exact"
then gives the remainder to the largest fractions. The arithmetic is rational: no rounding error,
and the result does not depend on the order of the modules.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Unpack

from adarank_fast.errors import AdarankError
from adarank_fast.models.text import list_names
from adarank_fast.options import gather, refuse_unknown
from adarank_fast.plan.budget import DEFAULT_AVERAGE_RANK, Budget, BudgetOptions

Number = Any  # Fraction or float, all scores the same


class Experts(NamedTuple):
    """What a 3-D parameter holds: how many experts, and how many of them a token passes through.

    `active` is 0 where that is not known.
    """

    total: int
    active: int


def allocate_ranks(
    scores: Mapping[str, float],
    budget: Budget | float | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    experts: Mapping[str, tuple[int, int]] | None = None,
    **options: Unpack[BudgetOptions],
) -> dict[str, int]:
    """Ranks in proportion to scores under a budget.

    Args:
        scores: module name -> disagreement, finite and >= 0, not all zero.
        budget: a `Budget`, or a number: the average rank.
        sizes: module name -> (in_features, out_features), of a parameter of experts those of all
            side by side. Caps a rank at min(in, out) of one; needed for `budget_parameters`.
        experts: name -> (experts, experts active for a token), of those that are parameters of
            experts; needed for `expert_rank="divided"`.
        options: the fields of `Budget` as keywords, instead of `budget`.

    Returns:
        name -> rank, in the order of `scores`. The budget is never exceeded.

    Raises:
        AdarankError: one line that names the argument, its value and the remedy.
    """
    flat: dict[str, object] = {**options}
    budget = gather(Budget, budget, flat)
    refuse_unknown(allocate_ranks, flat, Budget)
    _check_scores(scores)
    shared = SharedBudget(budget, scores, sizes, experts)
    return shared.ranks({name: Fraction(float(score)) for name, score in scores.items()})


class SharedBudget:
    """A budget and the modules that share it; arguments and errors as `allocate_ranks`."""

    def __init__(
        self,
        budget: Budget,
        names: Iterable[str],
        sizes: Mapping[str, tuple[int, int]] | None = None,
        experts: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        names, experts = list(names), experts or {}
        self.step = budget.rank_multiple
        self._divisors = {name: expert_divisor(name, experts, budget.expert_rank) for name in names}
        divided = experts.keys() if budget.expert_rank == "divided" else ()
        self._lows, self._highs = _bounds(names, sizes, experts, divided, budget)
        self._allocation = budget.allocation
        self._budget, said = _amount(budget, len(names))
        if budget.budget_parameters is None:
            self._costs = self._divisors
        elif sizes is None:
            raise AdarankError("budget_parameters needs sizes: name -> (in_features, out_features)")
        else:
            self._costs = {name: sum(sizes[name]) for name in names}
        least = sum(self._lows[name] * cost for name, cost in self._costs.items())
        if self._budget < least:
            also, remedy = "", "lower min_rank"
            if any(name in divided for name in names):
                also = ' and rank 1 or more of each expert (expert_rank="divided")'
                remedy = 'pass expert_rank="whole"'
            raise AdarankError(
                f"{said} is too small for min_rank={budget.min_rank}{also}, which needs {least}; "
                f"raise the budget or {remedy}"
            )
        most = sum(
            math.inf if high is None else high * self._costs[name]
            for name, high in self._highs.items()
        )
        if self._budget > most:
            raise AdarankError(
                f"{said} is more than all modules can take under max_rank, min(in, out) and "
                f"rank_multiple ({most}); lower the budget or loosen the bounds"
            )

    def ranks(self, scores: Mapping[str, Number]) -> dict[str, int]:
        """Ranks; exact for fractions, 40 times faster and right up to rounding for floats."""
        wanted = self.real_ranks(scores)
        ranks = {name: math.floor(x / self.step) * self.step for name, x in wanted.items()}
        if self._allocation == "exact":
            self._spend_remainder(ranks, wanted)
        return ranks

    def real_ranks(self, scores: Mapping[str, Number]) -> dict[str, Number]:
        """Ranks before rounding, in the arithmetic of the scores: fractions, or floats.

        x_m = clamp(lambda s_m, lo_m, hi_m), s_m = d_m / k_m, with sum c_m x_m = budget.
        spent(lambda) = sum c_m x_m is continuous, monotone and piecewise linear; its slope changes
        where a module leaves its lower bound or reaches its upper one. Sweep over these
        breakpoints.
        """
        scores = {name: score / self._divisors[name] for name, score in scores.items()}
        slope_changes: dict[Number, Number] = {}
        zero = 0 * next(iter(scores.values()))
        for name, score in scores.items():
            if score > 0:
                start, high = self._lows[name] / score, self._highs[name]
                slope = self._costs[name] * score
                slope_changes[start] = slope_changes.get(start, zero) + slope
                if high is not None:
                    stop = high / score
                    slope_changes[stop] = slope_changes.get(stop, zero) - slope

        position = slope = zero
        spent = zero + sum(self._lows[name] * cost for name, cost in self._costs.items())
        for breakpoint in sorted(slope_changes):
            ahead = spent + slope * (breakpoint - position)
            if ahead >= self._budget:
                break
            position, spent = breakpoint, ahead
            slope += slope_changes[breakpoint]
        if slope > 0:
            position += (self._budget - spent) / slope

        wanted = {}
        for name, score in scores.items():
            x, high = max(position * score, zero + self._lows[name]), self._highs[name]
            wanted[name] = x if high is None else min(x, zero + high)
        return wanted

    def _spend_remainder(self, ranks: dict[str, int], wanted: Mapping[str, Number]) -> None:
        """Spend what rounding down left: one step at a time to the largest x_m - r_m. In place.

        A module that cannot take or afford a step never can again, so it leaves the queue.
        """
        left = self._budget - sum(self._costs[name] * rank for name, rank in ranks.items())
        queue = [(ranks[name] - x, name) for name, x in wanted.items()]
        heapq.heapify(queue)
        while queue:
            surplus, name = heapq.heappop(queue)
            high, price = self._highs[name], self._costs[name] * self.step
            if price <= left and (high is None or ranks[name] + self.step <= high):
                ranks[name] += self.step
                left -= price
                heapq.heappush(queue, (surplus + self.step, name))


def _check_scores(scores: Mapping[str, float]) -> None:
    if not scores:
        raise AdarankError("scores is empty; give one score per module")
    bad = [name for name, score in scores.items() if not (math.isfinite(score) and score >= 0)]
    if bad:
        raise AdarankError(
            f"scores must be finite and not negative, got {scores[bad[0]]} for {list_names(bad)}; "
            "look for overflow in the model's outputs (try float32)"
        )
    if not any(scores.values()):
        raise AdarankError(
            "scores are all zero: perturbing the modules did not move the output; choose an output "
            "that depends on them, or a uniform plan"
        )


def expert_divisor(name: str, experts: Mapping[str, tuple[int, int]], expert_rank: str) -> int:
    """What a rank is divided by to give each expert's; 1 for what is not of experts.

    Raises:
        AdarankError: it is to be divided, and how many experts are active is not known.
    """
    if expert_rank != "divided" or name not in experts:
        return 1
    active = experts[name][1]
    if not active:
        raise AdarankError(
            f'expert_rank="divided": how many experts of {name} are active for a token is not '
            'known (num_experts_per_tok); use expert_rank="whole", or make the plan again'
        )
    return active


def highest_rank(name: str, size: tuple[int, int], experts: Mapping[str, tuple[int, int]]) -> int:
    """min(in, out) of a module, or of one of the experts that stand side by side."""
    return min(size) // (experts[name][0] if name in experts else 1)


def _bounds(
    names: list[str],
    sizes: Mapping[str, tuple[int, int]] | None,
    experts: Mapping[str, tuple[int, int]],
    divided: Collection[str],
    budget: Budget,
) -> tuple[dict[str, int], dict[str, int | None]]:
    """(lowest, highest) rank of each module, multiples of `rank_multiple`; None: no cap."""
    if sizes is not None and (missing := [name for name in names if name not in sizes]):
        raise AdarankError(f"sizes lacks {list_names(missing)}; give (in_features, out_features)")
    multiple = budget.rank_multiple
    lows = {
        name: -(-max(budget.min_rank, int(name in divided)) // multiple) * multiple
        for name in names
    }
    highs: dict[str, int | None] = {}
    for name in names:
        caps = [] if budget.max_rank is None else [budget.max_rank]
        caps += [] if sizes is None else [highest_rank(name, sizes[name], experts)]
        highs[name] = min(caps) // multiple * multiple if caps else None
    narrow = [name for name, high in highs.items() if high is not None and high < lows[name]]
    if narrow:
        raise AdarankError(
            f"min_rank={budget.min_rank} with rank_multiple={multiple} needs rank "
            f"{lows[narrow[0]]}, more than max_rank or min(in, out) allows "
            f"({highs[narrow[0]]}) for {list_names(narrow)}; "
            "lower min_rank or rank_multiple, or leave these modules out"
        )
    return lows, highs


def _amount(budget: Budget, modules: int) -> tuple[int, str]:
    """What there is, in ranks or in parameters, and how to name it in a message."""
    if budget.budget_parameters is not None:
        return budget.budget_parameters, f"budget_parameters={budget.budget_parameters}"
    average = float(DEFAULT_AVERAGE_RANK if budget.average_rank is None else budget.average_rank)
    # the fraction that was meant: 3 / 10 for 0.3 and 4 / 3 for 1.333..., both a little less inside
    total = math.floor(Fraction(average).limit_denominator(10**6) * modules)
    said = f"average_rank={average:g} ({total} ranks over {modules} modules)"
    if total == 0:
        raise AdarankError(f"{said} is less than one rank in all; raise average_rank")
    return total, said
