import json
import os
import random
import re
import warnings

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BertForSequenceClassification

from adarank_fast.models.targets import find_targets
from adarank_fast.plan.allocation import allocate_ranks
from adarank_fast.plan.rank_plan import RankPlan, Score
from tests.tiny_models import tiny


def mixed_plan(model, target_modules="attention", average_rank=4.0, seed=0, **settings):
    """A plan with made-up scores; the first module gets rank 0."""
    rng = random.Random(seed)
    sizes = {t.name: (t.in_features, t.out_features) for t in find_targets(model, target_modules)}
    scores = {n: Score.from_trials([rng.random() for _ in range(3)]) for n in sizes}
    scores[next(iter(sizes))] = Score.from_trials([0.0, 0.0, 0.0])
    means = {name: score.mean for name, score in scores.items()}
    ranks = allocate_ranks(means, average_rank, sizes)
    return RankPlan(ranks=ranks, sizes=sizes, scores=scores, settings=settings)


def adapter_ranks(peft_model, adapter="default"):
    return {
        name: (layer.r[adapter], layer.scaling[adapter])
        for name, layer in peft_model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }


def test_score_from_trials():
    score = Score.from_trials([1.0, 2.0, 6.0])
    assert score.mean == 3.0 and score.trials == (1.0, 2.0, 6.0)
    assert score.std == pytest.approx(7**0.5, rel=1e-15)  # (4 + 1 + 9) / (3 - 1)
    assert Score.from_trials([0.5]) == Score(0.5, 0.0, (0.5,))
    with pytest.raises(ValueError, match="trials is empty"):
        Score.from_trials([])


def test_parameters():
    plan = RankPlan(ranks={"a": 3, "b": 0, "c": 2}, sizes={"a": (4, 6), "b": (9, 9), "c": (5, 7)})
    assert plan.parameters == 3 * 10 + 2 * 12


def test_parts_must_agree():
    with pytest.raises(ValueError, match="ranks is empty"):
        RankPlan({}, {})
    with pytest.raises(ValueError, match="different modules, for example b"):
        RankPlan({"a": 1, "b": 1}, {"a": (4, 4)})
    with pytest.raises(ValueError, match="ranks lacks: b"):
        RankPlan({"a": 1}, {"a": (4, 4)}, {"b": Score.from_trials([1.0])})
    with pytest.raises(ValueError, match="negative, got -1 for a"):
        RankPlan({"a": -1}, {"a": (4, 4)})


def test_save_and_load_are_exact(tmp_path):
    trials = [0.1, 1 / 3, 5e-324, 1e150, 2 / 7]
    names = [f"layers.{i}.ü[{i}]" for i in range(12)]
    plan = RankPlan(
        ranks={name: i for i, name in enumerate(names)},
        sizes={name: (40 + i, 50) for i, name in enumerate(names)},
        scores={
            name: Score.from_trials([t * (i + 1) / 12 for t in trials])
            for i, name in enumerate(names)
        },
        settings={"seed": 3, "target_modules": ["q", "v"], "base_model_prefix": "bert."},
    )
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = RankPlan.load(str(path))
    assert loaded == plan
    assert list(loaded.ranks) == names  # the model's order, not layer 10 before layer 2
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["plan.json"]
    content = json.loads(first)
    assert content["schema"] == 1 and content["format"] == "adarank-fast plan"


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    plan = RankPlan({"a": 1}, {"a": (4, 4)})
    plan.save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        RankPlan({"a": 2}, {"a": (4, 4)}, settings={"output": object()}).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["plan.json"]
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        plan.save(tmp_path / "no" / "plan.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not json", "plan.json' is not a JSON file.*predict_ranks"),
        (b"\xff\xfe\x00", "plan.json' is not a JSON file"),
        (b"[1, 2]", "plan.json' is JSON but no adarank-fast plan"),
        (b'{"r": 8}', "plan.json' is JSON but no adarank-fast plan"),
        (b'{"format": "adarank-fast plan", "schema": 99}', "schema 99, .* up to 1; upgrade"),
        (b'{"format": "adarank-fast plan", "schema": 1}', "plan.json' is damaged: has no 'sizes'"),
    ],
)
def test_unreadable_plans(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        RankPlan.load(path)
    assert "\n" not in str(raised.value)


def test_missing_plan_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no plan file .*plan.json"):
        RankPlan.load(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="cannot read plan"):
        RankPlan.load(tmp_path)


def test_allocate_again():
    plan = mixed_plan(tiny("bert"), seed=1, metric="l1", average_rank=4.0)
    means = {name: score.mean for name, score in plan.scores.items()}
    again = plan.allocate(average_rank=2, max_rank=6)
    assert again.ranks == allocate_ranks(means, 2, plan.sizes, max_rank=6)
    assert sum(again.ranks.values()) == 2 * len(plan.ranks) and max(again.ranks.values()) <= 6
    assert again.scores == plan.scores
    assert again.settings["metric"] == "l1"
    assert again.settings["average_rank"] == 2 and again.settings["max_rank"] == 6
    spent = plan.allocate(budget_parameters=5000)
    assert 5000 - 64 < spent.parameters <= 5000
    assert spent.settings["average_rank"] is None
    assert plan.settings == {"metric": "l1"}
    with pytest.raises(ValueError, match="no scores to allocate by"):
        RankPlan.uniform(tiny("bert"), rank=2).allocate(average_rank=4)


def test_uniform():
    model = tiny("llama")
    plan = RankPlan.uniform(model, rank=3, target_modules=["q_proj", "k_proj"])
    assert set(plan.ranks.values()) == {3} and len(plan.ranks) == 6
    assert plan.parameters == 3 * 3 * (32 + 32 + 32 + 16)
    assert plan.settings["base_model_prefix"] == "model."
    assert plan.ranks.keys() == RankPlan.uniform(model.model, 3, ["q_proj", "k_proj"]).ranks.keys()
    with pytest.raises(ValueError, match=r"rank=17 exceeds min\(in, out\) of layers.0.*\[32, 16\]"):
        RankPlan.uniform(model, rank=17)
    with pytest.raises(ValueError, match="rank must be a positive integer, got 0"):
        RankPlan.uniform(model, rank=0)


def test_table():
    plan = RankPlan(
        ranks={"layers.2.q": 3, "layers.10.q": 12, "layers.2.v": 0},
        sizes={"layers.2.q": (64, 32), "layers.10.q": (64, 32), "layers.2.v": (64, 1000)},
        scores={
            "layers.2.q": Score(0.123456, 0.0123, (0.1, 0.2)),
            "layers.10.q": Score(1.5, 0.25, (1.0, 2.0)),
            "layers.2.v": Score(0.25, 0.0, (0.25,)),
        },
    )
    text = plan.table()
    assert "\x1b" not in text
    rows = [line.split() for line in text.splitlines()]
    assert "layers.2.q 64 x 32 0.1235 ± 10% 2 3 288".split() in rows
    assert "layers.10.q 64 x 32 1.5 ± 17% 2 12 1,152".split() in rows
    assert "layers.2.v 64 x 1000 0.25 1 0 0".split() in rows
    assert "3 modules 5 15 1,440".split() in rows
    assert "disagreement" in rows[0]
    assert text.endswith("±\nstandard deviation of the trials.")
    assert "disagreement" not in RankPlan(plan.ranks, plan.sizes).table()


@pytest.mark.parametrize(
    ("name", "size", "shown"),
    [
        ("layers.0.self_attn.q_proj", (576, 1536), "576 x 1536"),
        ("encoder.layer.0.attention.self.query", (384, 384), "self.query "),  # without its size
        ("encoder.block.10.layer.0.other.SelfAttention.q", (768, 768), "\n   SelfAttention.q"),
        ("a" * 200, (8, 8), "a" * 30),
    ],
)
def test_a_table_fits_80_columns(name, size, shown):
    scores = {name: Score.from_trials([0.001234, 0.001345])}
    plan = RankPlan({name: 8}, {name: size}, scores, {"metric": "l1", "allocation": "exact"})
    text = plan.allocate(average_rank=4).table()
    assert shown in text and max(map(len, text.splitlines())) <= 80
    assert "(mean\n|change of an output|), mean ± standard deviation of 2 trials." in text
    assert "May change" in text


@pytest.mark.parametrize(
    ("scaling", "scale"),
    [
        ("constant", lambda r: 2.0),
        (0.3, lambda r: 0.3),
        ("paper", lambda r: 8 / r),
        ("rslora", lambda r: 8 / r**0.5),
    ],
)
def test_lora_config_fits_base_and_task_model(scaling, scale):
    base = tiny("bert")
    plan = mixed_plan(base, base_model_prefix="bert.")
    for model, prefix in (
        (tiny("bert"), ""),
        (BertForSequenceClassification(base.config), "bert."),
    ):
        config = plan.to_lora_config(scaling=scaling, lora_dropout=0.1, modules_to_save=None)
        assert isinstance(config, LoraConfig) and config.lora_dropout == 0.1
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # keys that match no module
            found = adapter_ranks(get_peft_model(model, config))
        assert {n: r for n, (r, _) in found.items()} == {
            prefix + name: rank for name, rank in plan.ranks.items() if rank
        }
        for rank, actual in found.values():
            assert actual == pytest.approx(scale(rank), rel=1e-12)


class Tower(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "q-x": nn.Linear(8, 8)}) for _ in range(layers)
        )


class TwoTowers(Tower):
    def __init__(self):
        super().__init__(12)
        self.vision = Tower(12)


def test_keys_are_anchored_and_escaped():
    model = TwoTowers()
    names = [f"layers.{i}.{part}" for i in range(12) for part in ("q", "q-x")]
    plan = RankPlan({n: 1 + i % 7 for i, n in enumerate(names)}, dict.fromkeys(names, (8, 8)))
    config = plan.to_lora_config()
    found = adapter_ranks(get_peft_model(model, config))
    assert {n: r for n, (r, _) in found.items()} == plan.ranks  # none in the vision tower
    for keys in (config.rank_pattern, config.alpha_pattern):
        assert len(keys) == 7  # one a rank
        for name in [*names, *(f"vision.{n}" for n in names), "layersX0.q"]:
            matches = [key for key in keys if re.match(rf"(.*\.)?({key})$", name)]
            assert len(matches) == (name in plan.ranks)  # no key overlaps another


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r": 8}, "r=8 cannot be given with a plan: ranks come from the plan"),
        ({"rank_pattern": {"q": 1}}, "rank_pattern=.* ranks come from the plan"),
        ({"alpha_pattern": {"q": 1}}, "alpha_pattern=.* pass scaling"),
        ({"lora_alpha": 16}, "lora_alpha=16 .* pass scaling"),
        ({"target_modules": ["q"]}, "target_modules=.* the plan's modules"),
        ({"use_rslora": True}, 'use_rslora=True .* scaling="rslora"'),
        ({"scaling": "linear"}, "scaling must be .* got 'linear'"),
        ({"scaling": -1}, "scaling must be .* got -1"),
        ({"scaling": float("nan")}, "scaling must be .* got nan"),
    ],
)
def test_lora_config_refuses_what_the_plan_decides(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RankPlan({"q": 2}, {"q": (8, 8)}).to_lora_config(**kwargs)


def test_lora_config_of_an_empty_plan():
    with pytest.raises(ValueError, match="every rank of the plan is 0"):
        RankPlan({"q": 0}, {"q": (8, 8)}).to_lora_config()


@pytest.mark.parametrize(("experts", "fine"), [(["layers.0.w"], True), ([3], False), ("w", False)])
def test_a_file_names_its_expert_parameters(tmp_path, experts, fine):
    plan = RankPlan({"a": 1}, {"a": (4, 4)}, settings={"expert_parameters": ["x"]})
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    content["settings"]["expert_parameters"] = experts
    (tmp_path / "plan.json").write_text(json.dumps(content))
    if fine:
        assert RankPlan.load(tmp_path / "plan.json").settings["expert_parameters"] == experts
    else:
        with pytest.raises(ValueError, match="expert_parameters"):
            RankPlan.load(tmp_path / "plan.json")
