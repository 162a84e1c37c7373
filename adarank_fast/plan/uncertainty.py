"""How many trials a module needs, and how sure its rank is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from adarank_fast.errors import AdarankError
from adarank_fast.options import check_number

HALF_WIDTH = 1.96  # standard errors: a 95% interval
DRAWS = 200


@dataclass(frozen=True)
class AdaptiveTrials:
    """As many trials as a module's rank needs, within bounds.

    After `minimum` trials of every module, a module gets more until the 95% half-width of its rank,
    1.96 · rank · cv / sqrt(trials), is below one step of `rank_multiple`. The coefficient of
    variation cv is pooled over all modules: a few trials cannot tell one module's own. Modules with
    a large rank need more trials, as the half-width grows with the rank.

    Attributes:
        minimum: at least 2, since one trial has no spread.
        maximum: trials that no module exceeds.
    """

    minimum: int = 2
    maximum: int = 10

    def __post_init__(self) -> None:
        for name, value in (("minimum", self.minimum), ("maximum", self.maximum)):
            object.__setattr__(self, name, check_number(name, value))
        if self.maximum < self.minimum:
            raise AdarankError(
                f"AdaptiveTrials: maximum={self.maximum} is below minimum={self.minimum}; raise it"
            )

    def needed(
        self, trials: Mapping[str, Sequence[float]], ranks: Mapping[str, float], step: int = 1
    ) -> dict[str, int]:
        """How many trials each module should have in all.

        Args:
            trials: module name -> disagreements so far, at least one each.
            ranks: module name -> its rank before rounding.
            step: ranks are multiples of it.
        """
        cv = pooled_variation(trials.values())
        if cv is None:
            return dict.fromkeys(trials, self.minimum)
        wanted = {name: (HALF_WIDTH * ranks[name] * cv / step) ** 2 for name in trials}
        return {
            name: min(max(math.floor(count) + 1, self.minimum), self.maximum)
            for name, count in wanted.items()
        }


def pooled_variation(trials: Iterable[Sequence[float]]) -> float | None:
    """The coefficient of variation of one trial, pooled over modules; None: one trial each."""
    squares, freedom = 0.0, 0
    for values in trials:
        mean = math.fsum(values) / len(values)
        if mean > 0:
            squares += math.fsum((value / mean - 1) ** 2 for value in values)
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else None


def chance_of_change(
    trials: Mapping[str, Sequence[float]],
    ranks: Mapping[str, int],
    allocate: Callable[[dict[str, float]], Mapping[str, int]],
    draws: int = DRAWS,
) -> dict[str, float] | None:
    """For each module, the chance that another seed gives it another rank.

    Two runs with n trials differ in a module's score by a relative standard deviation of
    cv · sqrt(2 / n), cv pooled over modules. The scores of other seeds are drawn from that normal
    distribution around the scores found, and allocated.

    Args:
        trials: module name -> disagreement of every trial.
        ranks: module name -> rank that was given.
        allocate: scores -> ranks.
        draws: the result is a multiple of 1 / draws; the same every time.

    Returns:
        name -> chance; None if every module had one trial only.
    """
    cv = pooled_variation(trials.values())
    if cv is None:
        return None
    generator = random.Random(0)
    means = {name: math.fsum(values) / len(values) for name, values in trials.items()}
    top = max(means.values())  # ranks depend on ratios; what is 1e-100 of the largest is nothing
    means = {name: mean / top if mean / top > 1e-100 else 0.0 for name, mean in means.items()}
    changed = dict.fromkeys(trials, 0)
    for _ in range(draws):
        other = {
            name: mean * max(1 + cv * math.sqrt(2 / len(trials[name])) * generator.gauss(), 0.0)
            for name, mean in means.items()
        }
        for name, rank in allocate(other).items():
            changed[name] += rank != ranks[name]
    return {name: count / draws for name, count in changed.items()}
