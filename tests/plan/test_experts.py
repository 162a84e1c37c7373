"""Ranks of experts in 3-D parameters: how they are counted, divided, kept and read."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adarank_fast as ada
from adarank_fast.plan.allocation import SharedBudget, allocate_ranks
from adarank_fast.plan.budget import Budget
from tests.tiny_models import batch, tiny

SIZES = {"q": (32, 32), "up": (8 * 32, 8 * 96), "down": (8 * 48, 8 * 32)}
EXPERTS = {"up": (8, 4), "down": (8, 4)}
SCORES = {"q": 1.0, "up": 2.0, "down": 1.0}


@pytest.fixture(scope="module")
def plan():
    model = tiny("mixtral", layers=2)
    return ada.predict_ranks(model, [batch("mixtral")], 6, trials=2, progress=False)


def test_divided_is_the_whole_rank_over_the_active_experts():
    assert allocate_ranks(SCORES, 8) == {"q": 6, "up": 12, "down": 6}
    ranks = allocate_ranks(SCORES, 8, experts=EXPERTS, expert_rank="divided")
    # shares 6, 12 and 6 of 24: 12 / 4 and 6 / 4; the remainder buys no expert another rank
    assert ranks == {"q": 8, "up": 3, "down": 1}
    assert ranks["q"] + 4 * (ranks["up"] + ranks["down"]) == 24


@pytest.mark.parametrize("budget", [{"average_rank": 3}, {"budget_parameters": 3500}])
def test_every_expert_has_rank_1_at_least(budget):
    scores = {"q": 1.0, "up": 1e-6, "down": 0.0}
    ranks = allocate_ranks(scores, sizes=SIZES, experts=EXPERTS, expert_rank="divided", **budget)
    assert ranks["up"] == ranks["down"] == 1
    whole = allocate_ranks(scores, sizes=SIZES, experts=EXPERTS, **budget)
    assert whole["down"] == 0


@given(
    st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(6, 30),
)
def test_divided_spends_an_average_rank_in_ranks_that_a_token_passes(numbers, active, average):
    scores = dict(zip(SCORES, numbers, strict=True))
    experts = {"up": (8, active), "down": (8, active)}
    shared = SharedBudget(Budget(average, expert_rank="divided"), scores, None, experts)
    exact = shared.real_ranks({name: Fraction(score) for name, score in scores.items()})
    ranks = shared.ranks({name: Fraction(score) for name, score in scores.items()})
    weights = {"q": 1, "up": active, "down": active}
    spent = sum(weights[name] * rank for name, rank in ranks.items())
    assert 3 * average - active < spent <= 3 * average
    assert all(ranks[name] >= 1 for name in experts)
    free = [name for name in scores if scores[name] and exact[name] > 1]
    shares = {Fraction(exact[name] * weights[name]) / scores[name] for name in free}
    assert len(shares) <= 1  # of one lambda


def test_no_expert_gets_more_than_its_own_smaller_side():
    ranks = allocate_ranks({**SCORES, "up": 1e9}, 20, SIZES, EXPERTS)
    assert ranks["up"] == 32  # not 8 * 32


@pytest.mark.parametrize(
    "options, message",
    [
        ({"average_rank": 1}, "expert_rank=.divided.., which needs 8; .* expert_rank=.whole."),
        ({"expert_rank": "half"}, "expert_rank='half' is unknown; use one of whole, divided"),
        ({"experts": {"up": (8, 0)}}, "how many experts of up are active .* is not known"),
    ],
)
def test_what_cannot_be_divided_is_refused(options, message):
    options = {"experts": EXPERTS, "expert_rank": "divided", **options}
    with pytest.raises(ada.AdarankError, match=message):
        allocate_ranks(SCORES, **options)


def test_a_plan_has_experts_by_default_and_keeps_what_it_knows_of_them(plan, tmp_path):
    experts = [name for name in plan.ranks if ".experts." in name]
    assert len(experts) == 4 and len(plan.ranks) == 12
    assert plan.experts == dict.fromkeys(experts, (4, 2))
    assert "4 of 32 x 96" in plan.table()
    assert plan.to_frame().loc[experts[0], "experts"] == 4
    plan.save(tmp_path / "plan.json")
    loaded = ada.RankPlan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.experts == plan.experts
    assert loaded.chance_of_change() == plan.chance_of_change()
    divided = loaded.allocate(6, expert_rank="divided")
    assert divided.settings["expert_rank"] == "divided"
    assert divided.chance_of_change()
    spent = sum(rank * (2 if name in experts else 1) for name, rank in divided.ranks.items())
    assert spent == 72 == sum(plan.ranks.values())


def test_a_plan_of_an_older_release_loads(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    del content["settings"]["experts"], content["settings"]["expert_rank"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    old = ada.RankPlan.load(tmp_path / "plan.json")
    assert old.to_lora_config().to_dict() == plan.to_lora_config().to_dict()
    assert old.chance_of_change() and old.allocate(6).ranks == plan.ranks
    with pytest.raises(ada.AdarankError, match="make the plan again"):
        old.allocate(6, expert_rank="divided")


@pytest.mark.parametrize("experts", [[4], [0, 2], [4, -1], ["4", 2], 4, None])
def test_damaged_experts_are_refused(plan, tmp_path, experts):
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    content["settings"]["experts"]["layers.0.mlp.experts.down_proj"] = experts
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(ada.AdarankError, match="make the plan again"):
        ada.RankPlan.load(tmp_path / "plan.json")


def test_uniform_divides_too():
    model = tiny("mixtral", layers=1)
    for rank, expert_rank, expected in (5, "whole", 5), (5, "divided", 2), (1, "divided", 1):
        plan = ada.RankPlan.uniform(model, rank, expert_rank=expert_rank)
        ranks = {(name in plan.experts): each for name, each in plan.ranks.items()}
        assert ranks == {False: rank, True: expected}
    with pytest.raises(ada.AdarankError, match=r"exceeds min\(in, out\) of .*experts.* \[32, 96\]"):
        ada.RankPlan.uniform(model, 33, "experts")


@pytest.mark.parametrize(
    "targets, counts",
    [("auto", (4, 2)), ("attention", (4, 0)), ("experts", (0, 2)), ("all-linear", (4, 0))]
    + [(["all-linear", "experts"], (4, 2)), (["experts", "q_proj"], (1, 2))],
)
def test_presets(targets, counts):
    found = ada.find_targets(tiny("mixtral", layers=1), targets)
    of_experts = [target for target in found if target.parameter]
    assert (len(found) - len(of_experts), len(of_experts)) == counts


def test_other_parameters_with_three_dimensions_are_no_experts():
    from transformers import XLNetConfig, XLNetModel

    model = XLNetModel(XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=8))
    with pytest.raises(ada.AdarankError, match="found no experts in 3-D parameters in XLNetModel"):
        ada.find_targets(model, "experts")
    bert = tiny("bert", layers=1)
    assert ada.find_targets(bert) == ada.find_targets(bert, "attention")


def test_trainers_that_know_parameters_get_them(plan, tmp_path):
    ada.export_plan(plan, tmp_path / "a.yaml", "axolotl")
    lines = (tmp_path / "a.yaml").read_text().splitlines()
    named = next(line for line in lines if line.startswith("lora_target_parameters: "))
    kept = [name for name in plan.experts if plan.ranks[name]]
    assert json.loads(named.partition(": ")[2]) == kept
    with pytest.raises(ada.AdarankError, match="llama-factory: .* use format='peft' or 'axolotl'"):
        ada.export_plan(plan, tmp_path / "b.yaml", "llama-factory")
