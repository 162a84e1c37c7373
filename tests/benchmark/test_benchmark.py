"""`ada.benchmark` and `adarank bench`: what is told, and that the model stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import adarank_fast as ada
from adarank_fast.benchmarking import arms
from adarank_fast.benchmarking import benchmark as room
from adarank_fast.benchmarking.figures import figures
from adarank_fast.benchmarking.measure import bootstrap, overhead_ratio, timed
from adarank_fast.cli.main import app
from tests.tiny_models import tiny
from tests.tiny_texts import save_tiny

FAST: dict[str, Any] = dict(repetitions=6, compile=False, batch_size=2, max_length=16)


def mixed_plan(model: torch.nn.Module) -> ada.RankPlan:
    plan = ada.RankPlan.uniform(model, 4, "all-linear")
    ranks = {name: 1 + i % 7 for i, name in enumerate(plan.ranks)}
    return ada.RankPlan(ranks, plan.sizes, settings=plan.settings)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5"])
def test_every_variant_is_checked_and_timed_and_the_model_stays(kind: str) -> None:
    model = tiny(kind).train()
    model.requires_grad_(True)

    def state() -> list[Any]:
        kept = [(n, id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()]
        modules = [(type(m), m.training, len(m._forward_hooks)) for m in model.modules()]
        return [kept, modules, model.config.to_dict(), hasattr(model, "peft_config")]

    before, weights = state(), [p.clone() for p in model.parameters()]
    report = ada.benchmark(model, mixed_plan(model), **FAST)
    assert state() == before
    assert all(map(torch.equal, weights, model.parameters()))
    assert list(report.results["arms"]) == ["frozen", "PEFT", "ours", "ours, uniform"]
    assert all(len(numbers["seconds"]) == 6 for numbers in report.results["arms"].values())
    assert report["ours"]["difference_from_peft"] < 1e-4
    assert report["ours"]["error_in_float64"] < 1e-4
    assert report["PEFT"]["peak_bytes"] > report["frozen"]["peak_bytes"] > 0
    assert max(map(len, report.table().splitlines())) <= 80


def test_bfloat16_also_has_peft_with_float32_adapters() -> None:
    report = ada.benchmark(tiny("llama").bfloat16(), rank=4, **FAST)
    assert {"PEFT, float32", "ours, float32"} <= report.results["arms"].keys()
    ranks = report.results["settings"]["ranks"]
    assert ranks == [4]


def test_the_variants_share_the_frozen_weights() -> None:
    frozen = arms.frozen_copy(tiny("llama"))
    ids = torch.arange(8)[None]
    plan = mixed_plan(frozen)
    made = arms.make_arms(frozen, plan, None, torch.float32, {"input_ids": ids})
    own = {p.data_ptr() for p in frozen.parameters()}
    for arm in (made["PEFT"], made["ours"]):
        assert {p.data_ptr() for p in arm.parameters() if not p.requires_grad} == own
    theirs, ours = ({p.data_ptr() for p in arms.trainable(made[n])} for n in ("PEFT", "ours"))
    assert not theirs & ours


def test_other_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(peft_model: torch.nn.Module, example: Any) -> torch.nn.Module:
        model = ada.accelerate(arms.shared_copy(peft_model), example)
        with torch.no_grad():
            next(p for p in arms.trainable(model) if p.requires_grad).mul_(2)
        return model

    monkeypatch.setattr(arms, "fused", wrong)
    report = ada.benchmark(tiny("llama"), rank=4, **FAST)
    assert "gradients differ" in report["ours"]["why"] and "seconds" not in report["ours"]
    assert "not timed" in report.table()


def test_it_takes_fewer_tokens_where_time_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(room, "ADAPTED", 1e9)
    report = ada.benchmark(model, rank=4, **{**FAST, "batch_size": 4, "max_length": 64})
    assert report.results["settings"]["shape"] == [1, room.FEWEST]
    assert "32 tokens a step of 256, to keep within max_seconds." in report.results["notes"]


def test_compiled_failures_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(arms, "compiled", fails)
    report = ada.benchmark(tiny("llama"), rank=4, **{**FAST, "compile": True})
    assert report["ours, compiled"]["why"] == "cannot be compiled: no compiler"


def test_graphed_steps_are_over_the_graphed_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card: a graph is the step itself, and one kind of model cannot be captured."""

    def stand_in(model: torch.nn.Module, batch: Any) -> Any:
        return arms.step_of(model, batch)

    ids = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    frozen = arms.frozen_copy(tiny("llama"))
    made = arms.make_arms(frozen, mixed_plan(frozen), None, torch.float32, ids)
    steps: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {name: {"adapter_parameters": 1} for name in made}
    monkeypatch.setattr(room, "graphed", stand_in)
    room._add_graphed(made, ids, steps, rows)
    assert list(steps) == ["frozen, graphed", "PEFT, graphed", "ours, graphed"]
    own = [{p.data_ptr() for p in arms.trainable(made[n])} for n in ("PEFT", "ours")]
    before = [p.clone() for p in arms.trainable(made["ours"])]
    for step in steps.values():
        step()
    assert all(map(torch.equal, before, arms.trainable(made["ours"]))) and own[0] != own[1]

    seconds = {name: [1.0] * 3 for name in made} | {"ours": [3.0] * 3, "PEFT": [5.0] * 3}
    seconds |= {"frozen, graphed": [0.5] * 3, "PEFT, graphed": [0.8] * 3}
    found = figures("ours, graphed", seconds | {"ours, graphed": [0.6] * 3}, 8)
    assert found["overhead"]["value"] == pytest.approx(0.2)
    assert found["overhead_over_peft"]["value"] == pytest.approx(1 / 3)
    assert "overhead" not in figures("frozen, graphed", seconds, 8)

    def fails(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(room, "graphed", fails)
    room._add_graphed(made, ids, {}, rows)
    assert rows["ours, graphed"]["why"].startswith("cannot be captured: operation not permitted")


def test_the_command(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    texts = tmp_path / "texts.txt"
    texts.write_text("word1 word2 word3\nword4 word5\n")
    arguments = ["bench", str(folder), "--rank", "4", "--json", "--data"]
    done = CliRunner().invoke(app, [*arguments, str(texts), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["settings"]["tokens"] == 5 and found["arms"]["ours"]["tokens_per_second"] > 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.json", "steps.png", "table.txt"} <= names


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"max_seconds": -1}, "max_seconds must be a positive number"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"data": "texts.txt"}, "data must be a batch"),
        ({"plan": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ada.AdarankError, match=message):
        ada.benchmark(tiny("llama"), **options)


def test_what_timings_say() -> None:
    row = {"seconds": {"frozen": [1.0] * 5, "peft": [3.0] * 5, "ours": [2.0] * 5}}
    assert overhead_ratio([row], "ours", "peft", 50) == {"ratio": 0.5, "interval": [0.5, 0.5]}
    value, low, high = bootstrap([{"a": [1.0, 2.0, 9.0]}], lambda m: m[0]["a"])
    assert (value, low, high) == (2.0, 1.0, 9.0)
    ticks = iter(range(100))
    seconds = timed({"a": lambda: None, "b": lambda: None}, 3, clock=lambda: float(next(ticks)))
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_names_of_the_package() -> None:
    assert dir(ada) == sorted([*ada.__all__, "__version__"])
    assert callable(ada.benchmark)
    with pytest.raises(AttributeError, match="did you mean 'predict_ranks'"):
        ada.predict_rank  # noqa: B018


def test_a_plan_shows_itself() -> None:
    plan = mixed_plan(tiny("llama"))
    name = next(iter(plan.ranks))
    assert plan[name] == plan.ranks[name]
    assert "21 modules, ranks 1 to 7" in repr(plan) and "<pre>" in plan._repr_html_()
    with pytest.raises(ada.AdarankError, match="did you mean"):
        plan[name[:-1]]
    pandas = pytest.importorskip("pandas")
    frame = plan.to_frame()
    assert isinstance(frame, pandas.DataFrame) and frame["rank"].to_dict() == plan.ranks
