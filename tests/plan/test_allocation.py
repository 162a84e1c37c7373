import math
import random
from fractions import Fraction

import pytest

from adarank_fast.plan.allocation import _amount, allocate_ranks
from adarank_fast.plan.budget import Budget

# Printed in the AdaRank authors' public notebook (average rank 8, twelve layers).
PUBLISHED_SCORES = {
    "query": ".083476424 .1386449 .15169092 .15550506 .19022527 .23578437 .26204735 .2828268 "
    ".31076545 .32095137 .3350768 .3348988",
    "key": ".033799376 .076967776 .13152294 .16135047 .2009354 .23468475 .2515475 .28742248 "
    ".32996643 .33730012 .33189198 .33563563",
    "value": ".1067335 .2673352 .5113052 .64961135 .66023976 .6209688 .59066254 .61314476 "
    ".6017301 .72589016 .72327375 .570347",
    "dense": ".33768645 .46251282 .50760823 .5119684 .55298114 .59392816 .5549153 .59454644 "
    ".57808244 .59831434 .5870656 .4229684",
}
PUBLISHED_RANKS = {
    "query": [2, 4, 5, 5, 6, 8, 8, 9, 10, 10, 11, 11],
    "key": [1, 2, 4, 5, 7, 8, 8, 10, 11, 11, 11, 11],
    "value": [1, 3, 7, 9, 9, 8, 8, 8, 8, 10, 10, 8],
    "dense": [5, 7, 7, 7, 8, 9, 8, 9, 8, 9, 8, 6],
}
PUBLISHED_RANKS_TOGETHER = {
    "query": [1, 2, 3, 3, 3, 4, 5, 5, 6, 6, 6, 6],
    "key": [0, 1, 2, 3, 4, 4, 5, 5, 6, 7, 6, 6],
    "value": [2, 5, 10, 13, 13, 12, 12, 12, 12, 15, 15, 11],
    "dense": [7, 9, 10, 10, 11, 12, 11, 12, 12, 12, 12, 8],
}


def published(module):
    return {
        f"{module}.{layer}": float(score)
        for layer, score in enumerate(PUBLISHED_SCORES[module].split())
    }


@pytest.mark.parametrize("module", PUBLISHED_SCORES)
def test_published_rows(module):
    ranks = allocate_ranks(published(module), average_rank=8, allocation="paper")
    assert list(ranks.values()) == PUBLISHED_RANKS[module]


def test_published_rows_together():
    scores = {
        name: score for module in PUBLISHED_SCORES for name, score in published(module).items()
    }
    ranks = allocate_ranks(scores, average_rank=8, allocation="paper")
    for module, expected in PUBLISHED_RANKS_TOGETHER.items():
        assert [ranks[f"{module}.{layer}"] for layer in range(12)] == expected


def test_default_is_average_rank_8_spent_exactly():
    ranks = allocate_ranks(published("query"))
    assert sum(ranks.values()) == 96
    paper = allocate_ranks(published("query"), allocation="paper")
    assert all(0 <= ranks[name] - paper[name] <= 1 for name in ranks)


def test_largest_remainder_by_hand():
    # shares of 10: 1.43, 2.86, 5.71 -> 1, 2, 5; two steps to the largest remainders
    assert allocate_ranks({"a": 1, "b": 2, "c": 4}, average_rank=Fraction(10, 3)) == {
        "a": 1,
        "b": 3,
        "c": 6,
    }


@pytest.mark.parametrize(
    ("average", "modules", "total"),
    [
        (0.3, 10, 3),
        (4 / 3, 3, 4),
        (0.999999, 10**6, 999_999),
        (8, 7, 56),
        (7.5, 3, 22),
        (1 - 1e-7, 7, 7),
    ],
)
def test_an_average_is_the_fraction_that_was_meant(average, modules, total):
    assert _amount(Budget(average_rank=average), modules)[0] == total


def test_ties_go_by_name():
    assert allocate_ranks({"b": 1, "a": 1, "c": 1}, average_rank=4 / 3) == {"b": 1, "a": 2, "c": 1}


@pytest.mark.parametrize(("total", "modules"), [(3, 10), (4, 3), (100, 7), (1, 96), (2023, 224)])
def test_average_rank_given_as_a_quotient_spends_the_total(total, modules):
    scores = {f"m{i}": 1.0 + i for i in range(modules)}
    assert sum(allocate_ranks(scores, average_rank=total / modules).values()) == total


def test_what_a_capped_module_cannot_take_goes_to_the_others():
    scores, sizes = {"a": 8.0, "b": 1.0, "c": 1.0}, {"a": (4, 64), "b": (64, 64), "c": (64, 64)}
    assert allocate_ranks(scores, 10, sizes) == {"a": 4, "b": 13, "c": 13}
    assert allocate_ranks(scores, 10, max_rank=20) == {"a": 20, "b": 5, "c": 5}


def test_min_rank_is_taken_from_the_others():
    scores = {"a": 98.0, "b": 1.0, "c": 1.0}
    assert allocate_ranks(scores, 8, min_rank=2) == {"a": 20, "b": 2, "c": 2}
    assert allocate_ranks(scores, 8, min_rank=2, rank_multiple=4) == {"a": 16, "b": 4, "c": 4}


def test_parameter_budget_by_hand():
    # x = lambda d, 64 * lambda + 32 * 2 * lambda = 1000 -> lambda = 7.8125
    scores, sizes = {"a": 1.0, "b": 2.0}, {"a": (32, 32), "b": (16, 16)}
    floors = allocate_ranks(scores, sizes=sizes, budget_parameters=1000, allocation="paper")
    assert floors == {"a": 7, "b": 15}  # 7.81 and 15.6
    # 928 spent; one step of 64 for a, then the 8 left buy nothing
    assert allocate_ranks(scores, sizes=sizes, budget_parameters=1000) == {"a": 8, "b": 15}


def test_modules_that_do_not_matter_take_only_what_the_others_cannot():
    scores, sizes = {"a": 1.0, "b": 0.0, "c": 0.0}, {"a": (8, 8), "b": (32, 32), "c": (32, 32)}
    assert allocate_ranks(scores, 2, sizes) == {"a": 6, "b": 0, "c": 0}
    assert allocate_ranks(scores, 4, sizes) == {"a": 8, "b": 2, "c": 2}


def test_ranks_of_experts_by_hand():
    scores, experts = {"e": 1.0, "a": 1.0}, {"e": (8, 2)}
    sizes = {"e": (512, 640), "a": (64, 64)}

    def ranks(**options):
        return allocate_ranks(scores, 8, options.pop("sizes", sizes), experts, **options)

    assert ranks() == {"e": 8, "a": 8}
    # 2 ranks of e's experts pass a token: 2 * lambda / 2 + lambda = 16
    assert ranks(expert_rank="divided") == {"e": 4, "a": 8}
    assert allocate_ranks(scores, 8, expert_rank="divided") == {"e": 8, "a": 8}  # no experts
    narrow = sizes | {"e": (32, 512)}  # of eight side by side: 4 x 64 each
    assert ranks(sizes=narrow) == {"e": 4, "a": 12}
    with pytest.raises(ValueError, match="how many experts of e are active"):
        allocate_ranks(scores, 8, sizes, {"e": (8, 0)}, expert_rank="divided")
    assert allocate_ranks(scores, 8, sizes, {"e": (8, 0)}) == {"e": 8, "a": 8}
    with pytest.raises(
        ValueError, match='rank 1 or more of each expert .*pass expert_rank="whole"'
    ):
        allocate_ranks(scores, 1, sizes, {"e": (8, 4)}, expert_rank="divided", min_rank=0)


def test_properties_on_random_inputs():
    rng = random.Random(0)
    feasible = 0
    for _ in range(800):
        names = [f"m{i}" for i in range(rng.randint(1, 12))]
        scores = {n: rng.choice([0.0, rng.random(), rng.lognormvariate(0, 3), 0.5]) for n in names}
        scores[names[0]] = 1.0
        dims = [3, 8, 17, 64, 256]
        sizes = {n: (rng.choice(dims), rng.choice(dims)) for n in names}
        if equal := rng.random() < 0.5:
            sizes = dict.fromkeys(names, (64, 48))
        multiple = rng.choice([1, 1, 2, 4, 8])
        low = rng.choice([0, 0, 1, 3])
        high = rng.choice([None, None, 5, 16, 40])
        in_parameters = rng.random() < 0.5
        cost = {n: sum(sizes[n]) if in_parameters else 1 for n in names}
        budget = rng.randint(1, 20 * sum(cost.values()))
        options = dict(sizes=sizes, min_rank=low, max_rank=high, rank_multiple=multiple)
        if in_parameters:
            options["budget_parameters"] = budget
        else:
            options["average_rank"] = rng.choice([budget / len(names), rng.uniform(0.5, 20)])
            budget = math.floor(options["average_rank"] * len(names) + 1e-9)
        try:
            ranks = allocate_ranks(scores, **options)
        except ValueError as error:
            assert any(word in str(error) for word in ("too small", "more than", "less than one"))
            continue
        feasible += 1
        floors = allocate_ranks(scores, allocation="paper", **options)
        order = rng.sample(names, len(names))
        assert allocate_ranks({n: scores[n] for n in order}, **options) == ranks

        spent = sum(cost[n] * ranks[n] for n in names)
        caps = {n: min(*sizes[n], 10**9 if high is None else high) for n in names}
        steps = [n for n in names if ranks[n] + multiple <= caps[n]]
        assert spent <= budget
        assert sum(cost[n] * floors[n] for n in names) <= spent
        # nothing affordable is left over
        assert all(spent + cost[n] * multiple > budget for n in steps)
        if not in_parameters and budget % multiple == 0:
            assert spent == budget
        for n in names:
            assert low <= ranks[n] <= caps[n] and ranks[n] % multiple == 0
            assert low <= floors[n] <= ranks[n]
        if equal:
            for a in names:
                for b in names:
                    if scores[a] > scores[b]:
                        assert ranks[a] >= ranks[b] and floors[a] >= floors[b]
    assert feasible > 250


SIZES = {"a": (32, 32), "b": (16, 64)}


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({}, {}, "scores is empty"),
        ({"a": 1.0, "b": float("nan")}, {}, "scores must be finite.*nan for b"),
        ({"a": float("inf"), "b": 1.0}, {}, "scores must be finite.*inf for a"),
        ({"a": -1.0, "b": 1.0}, {}, "not negative.*-1.0 for a"),
        ({"a": 0.0, "b": 0.0}, {}, "scores are all zero"),
        (None, {"allocation": "best"}, "allocation='best' is unknown; use one of exact, paper"),
        (None, {"average_rank": 0}, "average_rank must be a positive number, got 0"),
        (None, {"average_rank": float("nan")}, "average_rank must be a positive number, got nan"),
        (None, {"average_rank": 0.4}, "average_rank=0.4 .* less than one rank"),
        (None, {"average_rank": 4, "budget_parameters": 100}, "both given"),
        (
            None,
            {"budget_parameters": 0, "sizes": SIZES},
            "budget_parameters must be a positive integer",
        ),
        (None, {"budget_parameters": 100}, "budget_parameters needs sizes"),
        (None, {"sizes": {"a": (32, 32)}}, "sizes lacks b"),
        (
            None,
            {"min_rank": 9},
            r"average_rank=8 \(16 ranks .* too small for min_rank=9, which needs 18;",
        ),
        (None, {"average_rank": 30, "sizes": SIZES}, r"average_rank=30 .* take .*\(48\)"),
        (None, {"max_rank": 4}, r"more than all modules can take .*\(8\)"),
        (None, {"min_rank": 5, "max_rank": 4}, "max_rank=4 is below min_rank=5"),
        (None, {"min_rank": 5, "max_rank": 6, "rank_multiple": 4}, "min_rank=5 .* needs rank 8"),
        (None, {"min_rank": 20, "sizes": SIZES, "average_rank": 24}, "min_rank=20 .* for b"),
        (None, {"rank_multiple": 0}, "rank_multiple must be a positive integer, got 0"),
        (None, {"min_rank": -1}, "min_rank must be an integer of at least 0"),
        (None, {"max_rank": 0}, "max_rank must be a positive integer"),
    ],
)
def test_bad_input_is_one_clear_line(scores, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        allocate_ranks({"a": 1.0, "b": 2.0} if scores is None else scores, **options)
    assert "\n" not in str(raised.value)
