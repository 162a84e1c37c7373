"""Share a rank budget out over modules in proportion to their disagreement. No torch here.

Module m has score d_m, bounds lo <= r_m <= hi_m and a cost per rank c_m: 1 when the budget is an
average rank, in + out when it is a number of parameters. The real-valued solution is

    x_m = clamp(lambda * d_m, lo, hi_m),   lambda such that  sum_m c_m x_m = budget,

so that what capped modules cannot take goes to the others. Without bounds this is the rule of
AdaRank (arXiv 2408.09015), x_m = total_rank * d_m / sum d. Ranks are x_m rounded down; "exact" then
gives the remainder to the largest fractions. The arithmetic is rational: no rounding error, and
the result does not depend on the order of the modules.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, Unpack

from adarank_fast.errors import AdarankError
from adarank_fast.models.text import list_names
from adarank_fast.options import gather, refuse_unknown
from adarank_fast.plan.budget import DEFAULT_AVERAGE_RANK, Budget, BudgetOptions

Number = Any  # Fraction or float, all scores the same


def allocate_ranks(
    scores: Mapping[str, float],
    budget: Budget | float | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    **options: Unpack[BudgetOptions],
) -> dict[str, int]:
    """Ranks in proportion to scores under a budget.

    Args:
        scores: module name -> disagreement, finite and >= 0, not all zero.
        budget: a `Budget`, or a number: the average rank.
        sizes: module name -> (in_features, out_features). Caps a rank at min(in, out); needed for
            `budget_parameters`.
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
    shared = SharedBudget(budget, scores, sizes)
    return shared.ranks({name: Fraction(float(score)) for name, score in scores.items()})


class SharedBudget:
    """A budget and the modules that share it; arguments and errors as `allocate_ranks`."""

    def __init__(
        self,
        budget: Budget,
        names: Iterable[str],
        sizes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        names = list(names)
        self.step = budget.rank_multiple
        self._low, self._highs = _bounds(names, sizes, budget)
        self._allocation = budget.allocation
        self._budget, said = _amount(budget, len(names))
        if budget.budget_parameters is None:
            self._costs = dict.fromkeys(names, 1)
        elif sizes is None:
            raise AdarankError("budget_parameters needs sizes: name -> (in_features, out_features)")
        else:
            self._costs = {name: sum(sizes[name]) for name in names}
        least = self._low * sum(self._costs.values())
        if self._budget < least:
            raise AdarankError(
                f"{said} is too small for min_rank={budget.min_rank}, which needs {least}; "
                "raise the budget or lower min_rank"
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

        x_m = clamp(lambda d_m, lo, hi_m) with sum c_m x_m = budget. spent(lambda) = sum c_m x_m is
        continuous, monotone and piecewise linear; its slope changes where a module leaves its lower
        bound or reaches its upper one. Sweep over these breakpoints.
        """
        slope_changes: dict[Number, Number] = {}
        zero = 0 * next(iter(scores.values()))
        for name, score in scores.items():
            if score > 0:
                start, high, slope = self._low / score, self._highs[name], self._costs[name] * score
                slope_changes[start] = slope_changes.get(start, zero) + slope
                if high is not None:
                    stop = high / score
                    slope_changes[stop] = slope_changes.get(stop, zero) - slope

        position = slope = zero
        spent = zero + self._low * sum(self._costs.values())
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
            x, high = max(position * score, zero + self._low), self._highs[name]
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


def _bounds(
    names: list[str], sizes: Mapping[str, tuple[int, int]] | None, budget: Budget
) -> tuple[int, dict[str, int | None]]:
    """(lowest rank, highest of each module), multiples of `rank_multiple`; None: no cap."""
    if sizes is not None and (missing := [name for name in names if name not in sizes]):
        raise AdarankError(f"sizes lacks {list_names(missing)}; give (in_features, out_features)")
    multiple = budget.rank_multiple
    low = -(-budget.min_rank // multiple) * multiple
    highs: dict[str, int | None] = {}
    for name in names:
        caps = [] if budget.max_rank is None else [budget.max_rank]
        caps += [] if sizes is None else [min(sizes[name])]
        highs[name] = min(caps) // multiple * multiple if caps else None
    narrow = [name for name, high in highs.items() if high is not None and high < low]
    if narrow:
        raise AdarankError(
            f"min_rank={budget.min_rank} with rank_multiple={multiple} needs rank {low}, more than "
            f"max_rank or min(in, out) allows ({highs[narrow[0]]}) for {list_names(narrow)}; "
            "lower min_rank or rank_multiple, or leave these modules out"
        )
    return low, highs


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
