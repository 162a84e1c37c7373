"""Options that are typed once: objects and flat keywords say the same."""

from __future__ import annotations

from dataclasses import fields

import pytest

import adarank_fast as ada
from adarank_fast.plan.budget import BudgetOptions
from adarank_fast.prediction.probe import ProbeOptions
from tests.prediction.tiny_predictions import predict
from tests.tiny_models import batch, tiny

SCORES = {"a": 1.0, "b": 3.0}


def test_keywords_for_type_checkers_are_the_fields():
    def typed(*classes):
        return {one.name: one.type for cls in classes for one in fields(cls)}

    annotations = {
        name: getattr(kind, "__forward_arg__", kind)
        for options in (BudgetOptions, ProbeOptions)
        for name, kind in options.__annotations__.items()
    }
    assert annotations == typed(ada.Budget, ada.Probe, ada.Limits)


def test_a_budget_goes_wherever_its_keywords_do():
    budget = ada.Budget(average_rank=3, max_rank=4)
    ranks = ada.allocate_ranks(SCORES, average_rank=3, max_rank=4)
    assert ada.allocate_ranks(SCORES, budget) == ada.allocate_ranks(SCORES, 3, max_rank=4) == ranks
    objects = dict(probe=ada.Probe(seed=2, trials=2), limits=ada.Limits())
    plan = ada.predict_ranks(
        tiny("bert"), [batch("bert")], ada.Budget(4, min_rank=1), progress=False, **objects
    )
    flat = predict(average_rank=4, min_rank=1, seed=2)
    assert (plan.ranks, plan.scores) == (flat.ranks, flat.scores)
    assert plan.settings == flat.settings
    assert plan.allocate(budget).ranks == plan.allocate(average_rank=3, max_rank=4).ranks
    assert plan.allocate(2).settings["average_rank"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(budget=ada.Budget(4), max_rank=2), "max_rank is given beside a Budget"),
        (dict(budget=4, average_rank=2), "average_rank is given beside a Budget"),
        (dict(averge_rank=2), "predict_ranks has no argument 'averge_rank'; .* 'average_rank'"),
        (dict(target_module="q"), "has no argument 'target_module'; .* 'target_modules'"),
        (dict(zzz=1), "has no argument 'zzz'; it has model, batches, .*average_rank"),
        (dict(probe=ada.Probe(), metric="kl"), "metric is given beside a Probe"),
        (dict(budget="8"), "average_rank must be a positive number, got '8'"),
    ],
)
def test_what_is_given_twice_or_misspelt(arguments, message):
    with pytest.raises(ada.AdarankError, match=message):
        ada.predict_ranks(None, [], **arguments)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("lora_droput", "lora_dropout"), ("exmple", "example"), ("modules_to_sav", "modules_to_save")],
)
def test_misspelt_keywords_of_a_lora_config(name, meant):
    model = tiny("llama")
    plan = ada.RankPlan.uniform(model, 2)
    message = f"has no argument {name!r}; did you mean {meant!r}"
    with pytest.raises(TypeError, match=f"inject {message}"):
        ada.inject(model, plan, **{name: 1})
    if name != "exmple":
        with pytest.raises(TypeError, match=f"to_lora_config {message}"):
            plan.to_lora_config(**{name: 1})


def test_a_dtype_by_its_name():
    assert predict(dtype="bfloat16").settings["dtype"] == "bfloat16"
