"""What a GPU gets: its own memory, and few large forwards. Played through on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from adarank_fast.models import memory
from adarank_fast.prediction import prober
from adarank_fast.prediction.replay import Replay
from tests.prediction.tiny_predictions import assert_same, predict
from tests.tiny_models import batch, tiny


@pytest.fixture
def runs(monkeypatch):
    """Folds of every forward of a probe."""
    counted, run = [], Replay.run

    def counting(self, index, folds, *args):
        counted.append(folds)
        return run(self, index, folds, *args)

    monkeypatch.setattr(Replay, "run", counting)
    return counted


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "gpt2"])
@pytest.mark.parametrize("joined", [1500, 10**6], ids=["some", "all"])
def test_blocks_that_fill_no_gpu_are_probed_together(kind, joined, runs, monkeypatch):
    batches = [batch(kind), batch(kind, lengths=(5, 4), seed=1)]
    options = dict(target_modules="all-linear", trials=2, max_memory=2**30)
    monkeypatch.setitem(prober.FOLDED_TOKENS, "cpu", 10**6)
    apart = predict(tiny(kind), batches, **options)
    before = len(runs)
    monkeypatch.setattr(prober, "joined_rows", lambda *_: joined)
    together = predict(tiny(kind), batches, **options)
    assert_same(apart, together)
    assert len(runs) - before < before
    if joined > 10**5:
        assert runs[before:] == [2 * len(together.ranks)] * len(batches)


def test_what_runs_one_by_one_is_not_joined(runs, monkeypatch):
    model, inputs = tiny("deberta"), [batch("deberta")]
    apart = predict(model, inputs)
    monkeypatch.setattr(prober, "joined_rows", lambda *_: 10**6)
    assert_same(apart, predict(model, inputs))


def test_little_work_is_few_rows_or_few_products(monkeypatch):
    card = torch.device("cuda")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=100)
    )
    assert prober.joined_rows(torch.device("cpu"), 1, 2) == 0
    assert prober.joined_rows(card, 10**9, 2) == prober.joined_rows(card, 10**9, 8) == 12800
    assert prober.joined_rows(card, 1 << 20, 2) == 100 << 12
    assert prober.joined_rows(card, 1 << 20, 4) == 100 << 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_work_is_counted_in_the_blocks_own_dtype(kind, dtype, monkeypatch):
    """Whatever the output is: mean pooling gives float32."""
    asked = []
    monkeypatch.setattr(prober, "joined_rows", lambda *rest: asked.append(rest) or 0)
    model = tiny(kind).to(dtype)
    predict(model, [batch(kind)], target_modules="attention", trials=1)
    (device, parameters, itemsize), *_ = asked
    assert device.type == "cpu" and itemsize == dtype.itemsize
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    assert parameters == sum(p.numel() for p in blocks[0].parameters())


def test_no_more_is_joined_than_folds_into_a_forward(runs, monkeypatch):
    monkeypatch.setattr(prober, "joined_rows", lambda *_: 10**6)
    monkeypatch.setattr(prober, "folds_for", lambda *_: 10)
    plan = predict(tiny("bert"), [batch("bert")], trials=2)
    assert len(plan.ranks) == 12 and runs == [8, 8, 8]


SHAPES = {
    "MiniLM": lambda c: c.BertConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536,
        vocab_size=1000,
    ),
    "MPNet": lambda c: c.MPNetConfig(num_hidden_layers=2, vocab_size=1000),
    "SmolLM2": lambda c: c.LlamaConfig(
        hidden_size=576, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=1000, tie_word_embeddings=True,
    ),
    "Qwen3": lambda c: c.Qwen3Config(
        hidden_size=1024, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=3072, vocab_size=1000, tie_word_embeddings=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_with_a_gpus_memory_a_block_is_one_forward(name, runs, monkeypatch):
    """The shapes of real models, two layers; 32 x 128 tokens as far as the budget is concerned."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(SHAPES[name](transformers)).eval()
    inputs = {"input_ids": torch.randint(5, 1000, (2, 8))}
    monkeypatch.setattr(
        "adarank_fast.prediction.noise.philox_normal",
        lambda shape, key, device: torch.ones(shape, device=device),
    )
    monkeypatch.setitem(prober.FOLDED_TOKENS, "cpu", prober.FOLDED_TOKENS["cuda"])
    plan = predict(model, [inputs], target_modules="all-linear", trials=5, max_memory=60 * 2**30)
    per_block = 5 * len(plan.ranks) // 2
    assert runs == [per_block, per_block]


def test_a_gpu_gives_half_of_what_is_free(monkeypatch):
    free = {"driver": 6 * 2**30, "reserved": 3 * 2**30, "allocated": 2**30}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["driver"], 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: free["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: free["allocated"])
    assert memory.free_bytes(torch.device("cuda")) == 8 * 2**30


def test_the_settings_name_the_budget_and_the_same_budget_gives_the_same_bits():
    first = predict(max_memory=10**6)
    assert first.settings["max_memory"] == 10**6
    again = predict(max_memory=first.settings["max_memory"])
    assert first.scores == again.scores
    assert predict().settings["max_memory"] > 0
    assert_same(first, predict(max_memory=10**9))
