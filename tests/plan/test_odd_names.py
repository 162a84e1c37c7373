"""Modules of any name go through pictures, tables, plans, patterns, adapters, trainers' files."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from torch import nn

import adarank_fast as ada
from adarank_fast.adapters.adapter_files import read_adapter
from adarank_fast.adapters.export import export_saved
from adarank_fast.plan.rank_plan import RankPlan, Score
from adarank_fast.plan.trainer_formats import render

NAMES = (
    *("a$b_$", "$", "q$", "^q", "a b", "a/b", "__", "_x", "[x]", "{}", "%s", "(a*)", "a+b", "*"),
    *("|", "a{b", "a\\b", "a,b", "'", '"', "<b>", "q", "q\n", "\nq", "a\nb", "\t", "\x00", "a\x7f"),
    *("\u00fc", "\u00b2", "\u2028", "\U0001f600", "9" * 30, "x" * 300, "#", ": ", "- a"),
)


def odd_net():
    net = nn.Module()
    for name in NAMES:
        net.add_module(name, nn.Linear(4, 4))
    return net


@pytest.fixture
def plan():
    made = RankPlan.uniform(odd_net(), rank=2, target_modules="all-linear")
    scores = {name: Score.from_trials([1.0 + i, 2.0]) for i, name in enumerate(made.ranks)}
    ranks = {name: 1 + i % 3 for i, name in enumerate(made.ranks)}
    return RankPlan(ranks, made.sizes, scores, made.settings)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_pictures(plan, tmp_path, kind):
    ada.plot_plan(plan, tmp_path / f"p.{kind}")
    assert (tmp_path / f"p.{kind}").stat().st_size > 1000


def test_files_and_tables(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == plan
    rows = plan.table().splitlines()
    assert sum(row.endswith((" 8", " 16", " 24")) for row in rows) == len(NAMES)  # parameters
    assert all(row.isprintable() for row in rows)


def test_adapters(plan, tmp_path):
    model = ada.inject(odd_net(), plan)
    model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert {name: len(a) for name, (a, _) in adapter.factors.items()} == plan.ranks
    assert export_saved(adapter, odd_net(), tmp_path / "served") == 8
    assert read_adapter(tmp_path / "served").factors.keys() == plan.ranks.keys()
    assert ada.export_uniform(model, tmp_path / "live") == 8


def test_trainers_formats(plan):
    config = plan.to_lora_config()
    assert json.loads(render(plan))["rank_pattern"] == config.rank_pattern
    found = yaml.safe_load(render(plan, "axolotl"))
    assert found["lora_rank_pattern"] == config.rank_pattern
    assert found["lora_target_modules"] == config.target_modules
    for name, rank in plan.ranks.items():
        keys = [key for key in config.rank_pattern if re.match(rf"(.*\.)?({key})$", name)]
        assert [config.rank_pattern[key] for key in keys] == [rank], name
    uniform = RankPlan({name: 1 for name in plan.ranks}, plan.sizes)
    with pytest.raises(ada.AdarankError, match="commas, which the name 'a,b' has"):
        render(uniform, "llama-factory")


def test_half_of_a_character():
    with pytest.raises(ada.AdarankError, match="half of a surrogate pair") as raised:
        RankPlan({"a\ud800": 1}, {"a\ud800": (4, 4)})
    assert str(raised.value).isprintable()


DAMAGED = {
    "rank of text": (("ranks", "a"), "2", 'ranks.a is "2", no integer from 0 to 4'),
    "rank of truth": (("ranks", "a"), True, "ranks.a is true, no integer"),
    "rank above the size": (("ranks", "a"), 5, "ranks.a is 5, no integer from 0 to 4"),
    "size of three": (("sizes", "a"), [4, 4, 4], "sizes.a is [4, 4, 4], not [in_features"),
    "size of zero": (("sizes", "a", 0), 0, "sizes.a.0 is 0, no integer from 1"),
    "score of text": (("scores", "a"), "x", 'scores.a is "x", no object'),
    "mean below 0": (("scores", "a", "mean"), -1, "scores.a.mean is -1, no number from 0"),
    "huge mean": (("scores", "a", "mean"), 10**400, "scores.a.mean is 1000"),
    "no trials": (("scores", "a", "trials"), [], "scores.a.trials is empty"),
    "ranks in a list": (("ranks",), [1], "ranks is [1], no object"),
    "no modules": (("ranks",), {}, "ranks is empty"),
    "prefix": (("settings", "base_model_prefix"), 3, "settings.base_model_prefix is 3, no text"),
    "metric": (("settings", "metric"), ["l1"], 'settings.metric is ["l1"], no text'),
    "budget": (("settings", "average_rank"), "x", "average_rank must be a positive number"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_plans(tmp_path, case):
    keys, value, message = DAMAGED[case]
    file = tmp_path / "plan.json"
    settings = {"allocation": "exact", "average_rank": 2}
    RankPlan({"a": 2}, {"a": (4, 4)}, {"a": Score.from_trials([1.0])}, settings).save(file)
    content = json.loads(file.read_text())
    holder = content
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ada.AdarankError) as raised:
        RankPlan.load(file)
    said = str(raised.value)
    assert str(file) in said and message in said and "make the plan again" in said
    assert said.isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', 'the key "a" is there twice'),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ("", "Expecting value"),
        ("1" * 5000, "not a JSON file"),
    ],
)
def test_what_is_no_json(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ada.AdarankError, match=message):
        RankPlan.load(tmp_path / "plan.json")
