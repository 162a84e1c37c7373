"""The benchmark's ways on a GPU with stand-ins for torch.cuda, and its corners."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.adapters import accelerate
from adarank_fast.benchmarking import arms, graphs, measure
from adarank_fast.benchmarking import benchmark as room
from adarank_fast.errors import AdarankError
from adarank_fast.models import memory
from adarank_fast.models.precision import copy_in_dtype
from tests.tiny_models import tiny

CARD = torch.device("cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a card that is not there."""
    said: list[str] = []

    def stream() -> Any:
        return SimpleNamespace(wait_stream=lambda other: said.append("wait"))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 250.0  # milliseconds

    for name, stand_in in {
        "current_stream": stream,
        "Stream": stream,
        "Event": Event,
        "stream": nullcontext,
        "set_stream": lambda stream: said.append("set stream"),
        "synchronize": lambda *device: said.append("synchronize"),
        "is_available": lambda: True,
        "reset_peak_memory_stats": lambda *device: said.append("reset"),
        "max_memory_allocated": lambda *device: 900,
        "memory_allocated": lambda *device: 300,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return said


def test_seconds_and_bytes_of_a_card(card: list[str]) -> None:
    ran: list[int] = []
    assert measure.event_seconds(lambda: ran.append(len(card))) == 0.25
    assert card == ["synchronize", "record", "record", "wait"] and ran == [2]
    found = measure.timed({"a": lambda: ran.append(0)}, 3, device=CARD, warm_up=1)
    assert found == {"a": [0.25] * 3} and len(ran) == 5
    assert measure.peak_bytes(lambda: ran.append(0), CARD) == 600
    memory.reset_peak_memory()
    assert card[-1] == "reset" and memory.peak_memory() == 900


@pytest.mark.parametrize("what", ["replayed", "unwritten", "fails"])
@pytest.mark.parametrize("masked", [0, 1])
def test_a_graphed_step(
    what: str, masked: int, card: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(3, 1)
    given: list[Any] = []

    def step() -> None:
        if what == "fails" and "captures" in card:
            raise RuntimeError("not permitted")
        for parameter in model.parameters():
            parameter.grad = (
                torch.ones_like(parameter) if parameter.grad is None else parameter.grad
            )
            parameter.grad.fill_(1.0)

    @contextmanager
    def graph(graph: Any, stream: Any) -> Any:
        card.append("captures")
        yield

    def step_of(model: nn.Module, batch: Any, capturable: bool) -> Any:
        given.append(batch)
        return step

    replay = step if what == "replayed" else lambda: None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=replay))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(graphs, "step_of", step_of)
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}
    batch["attention_mask"][1, 1:] -= masked
    if what == "replayed":
        assert graphs.graphed(model, batch) is replay
    else:
        kind, why = (
            (RuntimeError, "not permitted") if what == "fails" else (ArithmeticError, "unwritten")
        )
        with pytest.raises(kind, match=why):
            graphs.graphed(model, batch)
    assert ("set stream" in card) == (what == "fails")
    assert ("attention_mask" in given[0]) == bool(masked)  # a mask of ones says nothing


FAST: dict[str, Any] = dict(batch_size=2, max_length=16, repetitions=6)


def test_a_benchmark_without_time_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = room.timed
    monkeypatch.setattr(room, "COMPILING", 1e9)
    monkeypatch.setattr(room, "timed", lambda steps, repetitions, *a, **k: right(steps, 2, *a, **k))
    report = ada.benchmark(tiny("llama"), rank=4, compile=True, **FAST)
    assert report["ours, compiled"]["why"] == "no time to compile; raise max_seconds"
    assert "2 of 6 repetitions, to keep within max_seconds." in report.results["notes"]


def test_calls_that_are_not_fused_and_uniform_ranks_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("llama")
    plan = ada.RankPlan.uniform(model, 4, "all-linear")
    ranks = {name: 1 + i % 7 for i, name in enumerate(plan.ranks)}
    plan = ada.RankPlan(ranks, plan.sizes, settings=plan.settings)
    monkeypatch.setattr(accelerate, "accelerate", lambda model, example: model)
    monkeypatch.setattr(room, "fusion_report", lambda model: SimpleNamespace(fused_share=0.25))
    monkeypatch.setattr(room, "TOLERANCE", {torch.float32: -1.0})
    report = ada.benchmark(model, plan, compile=False, **FAST)
    assert "ours: 25% of the calls fused; ada.fusion_report says why." in report.results["notes"]
    why = report["ours"]["why"]
    assert "please report it" in why and report["ours, uniform"]["why"] == why


def test_what_stands_for_the_tokens() -> None:
    embeddings, other = torch.zeros(4, 8, 5), torch.zeros(3, 8)
    batch = {"scale": torch.zeros(4), "inputs_embeds": embeddings, "other": other, "flag": True}
    assert room._main(batch) is embeddings and room._tokens(batch) == 32
    cut = {key: room._cut(value, (4, 8), (2, 6)) for key, value in batch.items()}
    shapes = [tuple(t.shape) for t in cut.values() if isinstance(t, torch.Tensor)]
    assert shapes == [(2,), (2, 6, 5), (3, 8)] and cut["flag"] is True


def test_models_that_cannot_be_timed() -> None:
    class Vision(nn.Module):
        config = SimpleNamespace()

        def get_input_embeddings(self) -> nn.Module:
            return nn.Conv2d(3, 4, 2)

    with pytest.raises(AdarankError, match="Vision does not read tokens; give data="):
        room._random_batch(SimpleNamespace(), Vision(), 2, 8)  # type: ignore[arg-type]
    moved = tiny("llama")
    moved.model.layers[0]._hf_hook = SimpleNamespace()
    with pytest.raises(AdarankError, match="spread over devices or offloaded; benchmark it on one"):
        arms.frozen_copy(moved)
    with pytest.raises(AdarankError, match="spread over devices or offloaded; leave dtype out"):
        copy_in_dtype(moved, torch.bfloat16)
    with pytest.raises(AdarankError, match="quantised and cannot be cast; leave dtype out"):
        copy_in_dtype(nn.ParameterList([nn.Parameter(torch.ones(2).int(), False)]), torch.float64)
    with pytest.raises(AdarankError, match="Linear has no get_input_embeddings"):
        arms.frozen_copy(nn.Linear(2, 2))
