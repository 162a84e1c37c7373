"""Allocators: the same budget shared out in other ways."""

from __future__ import annotations

import copy
from importlib.metadata import EntryPoint

import pytest
import torch

from adarank_fast import options
from adarank_fast.comparison import allocators
from adarank_fast.comparison.allocators import (
    ALLOCATORS,
    Problem,
    allocate,
    check_budget,
    find_allocator,
)
from adarank_fast.plan.rank_plan import RankPlan
from tests.comparison.comparisons import run
from tests.tiny_models import batch, tiny


def problem(model, **changes):
    return Problem(model, [batch("bert")], RankPlan.uniform(model, 3), trials=2, **changes)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_allocators(name):
    model = tiny("bert")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    asked = problem(model)
    plan = allocate(name, asked)
    assert plan.ranks.keys() == asked.uniform.ranks.keys()
    check_budget({name: plan}, asked.uniform.parameters)
    assert plan.settings["seconds"] >= 0
    assert allocate(name, problem(model)).ranks == plan.ranks
    if name != "eva":  # whose ranks can be even: PEFT's are, in the test below
        assert (len(set(plan.ranks.values())) == 1) == (name == "uniform")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    if name in ("random", "reversed"):
        assert sorted(plan.ranks.values()) == sorted(asked.adarank.ranks.values())
        assert plan.ranks != asked.adarank.ranks


def test_reversed_gives_the_highest_rank_to_the_lowest_score():
    asked = problem(tiny("bert"))
    scores = {name: score.mean for name, score in asked.adarank.scores.items()}
    order = sorted(scores, key=lambda name: scores[name])
    ranks = [allocate("reversed", asked).ranks[name] for name in order]
    assert ranks == sorted(ranks, reverse=True)
    ours = [asked.adarank.ranks[name] for name in order]
    assert ours == sorted(ours)


def test_eva_takes_pefts_ranks():
    from peft import EvaConfig, LoraConfig, get_peft_model
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    model = tiny("bert")
    inputs = [batch("bert", seed=seed) for seed in range(2)]
    ranks = allocate("eva", Problem(model, inputs, RankPlan.uniform(model, 3))).ranks
    config = LoraConfig(
        r=3,
        target_modules=list(ranks),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0, use_label_mask=False),
    )
    peft_model = get_peft_model(copy.deepcopy(model), config)
    initialize_lora_eva_weights(peft_model, inputs, show_progress_bar=False)
    layers = dict(peft_model.base_model.model.named_modules())
    own = {name: getattr(layers[name], "r", {}).get("default", 0) for name in ranks}
    assert ranks == own


def test_unequal_modules_stay_within_the_budget():
    model = tiny("llama", layers=3)  # k and v are half as wide
    asked = Problem(model, [batch("llama")], RankPlan.uniform(model, 8), trials=2)
    for name in ALLOCATORS:
        check_budget({name: allocate(name, asked)}, asked.uniform.parameters)


def test_adding_an_allocator_touches_one_place(monkeypatch):
    def first_half(asked):
        weights = {name: float(i % 2) for i, name in enumerate(asked.uniform.ranks)}
        return asked.within_budget(weights, allocation="first_half")

    monkeypatch.setitem(allocators.ALLOCATORS, "first_half", first_half)
    made = run(("first_half", "uniform"), 1, learning_rates=(1e-2,))
    assert made.results["arms"]["first_half"]["highest_rank"] == 4


def by_size(problem):
    """An allocator of a user's own."""
    modules = dict(problem.model.named_modules())
    assert all(path in modules for path in problem.targets)
    return problem.within_budget(
        {name: sum(problem.uniform.sizes[name]) for name in problem.targets.values()}
    )


def test_allocators_from_elsewhere(tmp_path, monkeypatch):
    asked = problem(tiny("bert"))
    plan = allocate(by_size, asked)
    assert find_allocator(by_size)[0] == "by_size" and plan.parameters <= asked.budget
    (tmp_path / "mine_to_try.py").write_text("def even(problem):\n    return problem.uniform\n")
    monkeypatch.chdir(tmp_path)
    assert allocate("mine_to_try:even", asked).ranks == asked.uniform.ranks
    installed = EntryPoint("even_too", "mine_to_try:even", allocators.GROUP)
    monkeypatch.setattr(options, "entry_points", lambda group: [installed])
    assert allocate("even_too", asked).ranks == asked.uniform.ranks
    with pytest.raises(ValueError, match="'mine_to_try:odd': .*; give module:function"):
        allocate("mine_to_try:odd", asked)
    with pytest.raises(TypeError, match="arm '<lambda>' must return a RankPlan, got dict"):
        allocate(lambda problem: {}, asked)
