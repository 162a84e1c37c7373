"""How many probes: fixed or adaptive trials, a time limit, another dtype."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.models.precision import copy_in_dtype
from adarank_fast.plan.uncertainty import pooled_variation
from tests.prediction.tiny_predictions import predict
from tests.tiny_models import batch, tiny


def test_the_copy_in_another_dtype_shares_nothing_and_keeps_buffers():
    model = tiny("llama")
    other = copy_in_dtype(model, torch.bfloat16)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {b.dtype for n, b in other.named_buffers() if "inv_freq" in n} == {torch.float32}
    mine = {p.data_ptr() for p in model.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in other.parameters())


def test_probing_in_bfloat16():
    model, inputs = tiny("llama"), batch("llama")
    exact = predict(model, [inputs])
    coarse = predict(model, [inputs], dtype=torch.bfloat16)
    assert coarse.settings["dtype"] == "bfloat16" and exact.settings["dtype"] == "float32"
    for name, score in exact.scores.items():
        assert coarse.scores[name].mean == pytest.approx(score.mean, rel=0.1)
        assert abs(coarse.ranks[name] - exact.ranks[name]) <= 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_adaptive_trials_go_where_ranks_are_large():
    fixed = predict(trials=12, average_rank=16)
    plan = predict(trials=ada.AdaptiveTrials(2, 12), average_rank=16)
    counts = {name: len(score.trials) for name, score in plan.scores.items()}
    for name, score in plan.scores.items():
        assert score.trials == pytest.approx(fixed.scores[name].trials[: counts[name]], rel=1e-5)
    cv = pooled_variation([score.trials for score in plan.scores.values()])
    assert min(counts.values()) < max(counts.values())
    total = sum(score.mean for score in plan.scores.values())
    for name, score in plan.scores.items():
        rank = 16 * len(counts) * score.mean / total
        half_width = 1.96 * rank * cv / math.sqrt(counts[name])
        assert half_width < 1.05 or counts[name] == 12  # the total moved with the last round
    assert plan.settings["trials"] == {"minimum": 2, "maximum": 12}


@pytest.mark.parametrize("bounds", [(1, 5), (4, 3), (2.5, 3)])
def test_adaptive_trials_reject(bounds):
    with pytest.raises(ValueError, match="m(in|ax)imum"):
        ada.AdaptiveTrials(*bounds)


def test_the_chance_of_another_rank_is_what_other_seeds_show():
    plans = [predict(seed=seed, trials=3, average_rank=8) for seed in range(12)]
    said = [sum(plan.chance_of_change().values()) / len(plan.ranks) for plan in plans]
    pairs = [(a, b) for i, a in enumerate(plans) for b in plans[:i]]
    seen = [sum(a.ranks[n] != b.ranks[n] for n in a.ranks) / len(a.ranks) for a, b in pairs]
    assert sum(said) / len(said) == pytest.approx(sum(seen) / len(seen), abs=0.1)
    assert predict(trials=1).chance_of_change() is None
    assert "May change" in plans[0].table() and "May change" not in predict(trials=1).table()


def test_max_seconds(monkeypatch):
    with pytest.raises(TimeoutError, match=r"before 12 of 12 modules had a trial"):
        predict(max_seconds=1e-9)
    clock = iter([0.0] * 5 + [0.5] * 3 + [2.0] * 1000)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.warns(UserWarning, match=r"max_seconds=1: \d+ of 12 modules had fewer than 5"):
        plan = predict(max_seconds=1, trials=5)
    assert {len(score.trials) for score in plan.scores.values()} <= {1, 2, 3, 4}


def test_the_plan_file_keeps_all_of_it(tmp_path):
    plan = predict(trials=ada.AdaptiveTrials(2, 4), dtype=torch.bfloat16)
    plan.save(tmp_path / "plan.json")
    assert ada.RankPlan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["settings"]["dtype"] == "bfloat16"


def test_many_trials_in_little_time_reach_every_module():
    """The rounds cost as much as what they run, whatever `trials` is."""
    model, inputs = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), {"input": torch.randn(3, 6)}
    with pytest.warns(UserWarning, match="fewer than 1000000 trials"):
        plan = predict(
            model,
            [inputs],
            average_rank=2,
            target_modules="all-linear",
            trials=10**6,
            max_seconds=2,
        )
    counts = {len(score.trials) for score in plan.scores.values()}
    assert min(counts) >= 5 and max(counts) - min(counts) <= 1
