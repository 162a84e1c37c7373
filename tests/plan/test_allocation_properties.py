"""What holds of every allocation, on instances that hypothesis searches for a counterexample."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adarank_fast.plan.allocation import allocate_ranks

quick = settings(derandomize=True, database=None, deadline=None, max_examples=150)
POSITIVE = st.floats(2.0**-20, 2.0**20)
SCORES = st.just(0.0) | POSITIVE
IN_RANKS, IN_PARAMETERS = st.just(False), st.just(True)
EITHER = st.booleans()


@dataclass(frozen=True)
class Instance:
    """Scores, and a budget that can be spent within the bounds."""

    scores: dict[str, float]
    sizes: dict[str, tuple[int, int]]
    budget: int  # ranks, or parameters
    parameters: bool
    bounds: dict[str, Any] = field(default_factory=dict)

    @property
    def costs(self) -> dict[str, int]:
        return {name: sum(s) if self.parameters else 1 for name, s in self.sizes.items()}

    @property
    def caps(self) -> dict[str, int]:
        highest, step = self.bounds["max_rank"], self.bounds["rank_multiple"]
        return {n: min(*s, highest or min(s)) // step * step for n, s in self.sizes.items()}

    @property
    def lowest(self) -> int:
        step = self.bounds["rank_multiple"]
        return -(-self.bounds["min_rank"] // step) * step

    def ranks(self, allocation: str = "exact") -> dict[str, int]:
        budget: dict[str, Any] = {"budget_parameters": self.budget}
        if not self.parameters:
            budget = {"average_rank": self.budget / len(self.scores)}
        return allocate_ranks(
            self.scores, sizes=self.sizes, allocation=allocation, **budget, **self.bounds
        )

    def spent(self, ranks: dict[str, int]) -> int:
        return sum(self.costs[name] * rank for name, rank in ranks.items())


@st.composite
def instances(draw, unit=EITHER, dims=(3, 8, 17, 64), scores=SCORES):
    names = draw(st.permutations([f"m{i}" for i in range(draw(st.integers(1, 7)))]))
    found = {name: draw(scores) for name in names}
    assume(any(found.values()))
    dim = st.sampled_from(dims)
    sizes = {name: (draw(dim), draw(dim)) for name in names}
    bounds = {
        "min_rank": draw(st.integers(0, 3)),
        "max_rank": draw(st.none() | st.integers(3, 40)),
        "rank_multiple": draw(st.sampled_from([1, 2, 3, 8])),
    }
    bare = Instance(found, sizes, 0, draw(unit), bounds)
    assume(bare.lowest <= min(bare.caps.values()))
    least = bare.spent(dict.fromkeys(names, bare.lowest))
    most = bare.spent(bare.caps)
    assume(most > 0)
    return replace(bare, budget=draw(st.integers(max(least, 1), most)))


OF_ONE_PRICE = instances(IN_RANKS) | instances(dims=(64,))
ALLOCATION = st.sampled_from(["exact", "paper"])


@quick
@given(instances(), ALLOCATION)
def test_bounds_and_budget_are_kept(instance, allocation):
    ranks = instance.ranks(allocation)
    assert list(ranks) == list(instance.scores)
    assert instance.spent(ranks) <= instance.budget
    for name, rank in ranks.items():
        assert instance.lowest <= rank <= instance.caps[name] <= min(instance.sizes[name])
        assert rank % instance.bounds["rank_multiple"] == 0


@quick
@given(instances(IN_RANKS))
def test_an_average_rank_is_spent_exactly(instance):
    """Up to what the multiple leaves over."""
    step = instance.bounds["rank_multiple"]
    assert sum(instance.ranks().values()) == instance.budget // step * step


@quick
@given(instances(IN_PARAMETERS))
def test_less_than_the_cheapest_step_stays_unspent(instance):
    ranks, step = instance.ranks(), instance.bounds["rank_multiple"]
    left = instance.budget - instance.spent(ranks)
    open_to = [name for name, rank in ranks.items() if rank < instance.caps[name]]
    assert all(instance.costs[name] * step > left for name in open_to)


@quick
@given(instances())
def test_exact_adds_to_paper(instance):
    floors = instance.ranks("paper")
    assert all(rank >= floors[name] for name, rank in instance.ranks().items())


@quick
@given(OF_ONE_PRICE, ALLOCATION, st.data())
def test_a_higher_score_never_costs_rank(instance, allocation, data):
    name = data.draw(st.sampled_from(sorted(instance.scores)))
    more = instance.scores[name] + data.draw(POSITIVE)
    raised = replace(instance, scores=instance.scores | {name: more})
    assert raised.ranks(allocation)[name] >= instance.ranks(allocation)[name]


@quick
@given(instances(), st.data())
def test_a_higher_score_never_costs_rank_before_the_remainder(instance, data):
    """Of parameters, too: which steps the rest of such a budget can pay for is a matter of luck."""
    name = data.draw(st.sampled_from(sorted(instance.scores)))
    more = instance.scores[name] + data.draw(POSITIVE)
    raised = replace(instance, scores=instance.scores | {name: more})
    assert raised.ranks("paper")[name] >= instance.ranks("paper")[name]


@quick
@given(instances(), ALLOCATION)
def test_modules_of_one_size_are_ranked_by_score(instance, allocation):
    ranks, scores, sizes = instance.ranks(allocation), instance.scores, instance.sizes
    for one in scores:
        for other in scores:
            if sizes[one] == sizes[other] and scores[one] > scores[other]:
                assert ranks[one] >= ranks[other]


@quick
@given(instances(), ALLOCATION, st.data())
def test_the_order_of_modules_does_not_matter(instance, allocation, data):
    order = data.draw(st.permutations(list(instance.scores)))
    shuffled = replace(instance, scores={name: instance.scores[name] for name in order})
    assert shuffled.ranks(allocation) == instance.ranks(allocation)


@quick
@given(instances(), ALLOCATION, st.integers(-60, 60))
def test_a_power_of_two_does_not_matter(instance, allocation, exponent):
    scaled = {name: score * 2.0**exponent for name, score in instance.scores.items()}
    assert replace(instance, scores=scaled).ranks(allocation) == instance.ranks(allocation)


@quick
@given(instances(scores=st.integers(0, 2**20).map(float)), ALLOCATION, st.integers(1, 2**30))
def test_a_factor_that_rounds_nothing_does_not_matter(instance, allocation, factor):
    scaled = {name: score * factor for name, score in instance.scores.items()}
    assert replace(instance, scores=scaled).ranks(allocation) == instance.ranks(allocation)
