import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.models.forward_patching import undisturbed
from adarank_fast.models.memory import LiveBytes, Memory, default_memory
from adarank_fast.models.outputs import choose_output
from adarank_fast.models.targets import find_targets
from adarank_fast.prediction.noise import Variant, measure_stds
from adarank_fast.prediction.prober import Prober
from adarank_fast.prediction.recording import record_clean_passes
from adarank_fast.prediction.replay import Replay, StoredTensor
from tests.tiny_models import batch, tiny

LENGTHS = (24,) * 16


def test_live_bytes_count_each_storage_once_and_only_while_it_lives():
    weight = torch.randn(10, 10)
    with LiveBytes() as live:
        x = torch.ones(10, 10)  # 400 bytes
        y = x @ weight.t()  # 400 more; the transpose is a view
        assert live.peak == 800
        del x
        y.relu_()
        view = y.view(-1)[:3]
        del y
        z = view + 1  # 12, on top of the storage that the view holds
        assert live.peak == 800
        del view, z
        torch.zeros(300)
    assert live.peak == 1200


def opened(model, inputs):
    targets = find_targets(model, "attention")
    clean = record_clean_passes(model, choose_output(model, "auto", inputs), [inputs], targets)
    return targets, Replay(clean)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("forwards", [4, 8, 20])
def test_probing_stays_within_its_memory(kind, forwards):
    model, inputs = tiny(kind), batch(kind, lengths=LENGTHS)
    with undisturbed(model):
        targets, replay = opened(model, inputs)
        memory = Memory(forwards * replay.clean.live_bytes[0])
        prober = Prober(model, replay, 0, "l1", measure_stds(targets), memory)
        with LiveBytes() as live:
            for _ in prober.run([Variant(t, trial) for t in targets for trial in range(5)]):
                pass
    returned = 2 * inputs["input_ids"].numel() * 32 * 4  # by the last two blocks
    assert replay.clean.live_bytes[0] < live.peak <= memory.total + returned


def test_the_default_is_half_a_model_and_one_and_a_half_forwards(monkeypatch):
    monkeypatch.setattr("adarank_fast.models.memory.LEAST", 0)
    model, inputs = tiny("bert"), batch("bert", lengths=LENGTHS)
    with undisturbed(model):
        _, replay = opened(model, inputs)
        memory = default_memory(model, [inputs], replay.clean.live_bytes, [inputs])
        with LiveBytes() as live:
            model.get_submodule(replay.clean.reader.output.root)(**inputs)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert memory.total == pytest.approx(held / 2 + 1.5 * live.peak, rel=0.1)
    half = {key: value[:8] for key, value in inputs.items()}
    assert default_memory(model, [half], [live.peak // 2], [inputs]).total == pytest.approx(
        held / 2 + 1.5 * live.peak
    )


def test_little_memory_gives_the_same_plan():
    model, inputs = tiny("bert"), [batch("bert", lengths=(9, 7, 9, 4))]
    plan = ada.predict_ranks(model, inputs, 8, trials=3, progress=False)
    little = ada.predict_ranks(model, inputs, 8, trials=3, max_memory=1, progress=False)
    assert plan.ranks == little.ranks
    for name, score in plan.scores.items():
        assert little.scores[name].trials == pytest.approx(score.trials, rel=1e-5)


def test_without_room_products_are_computed_again(monkeypatch):
    calls = []
    linear = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, *rest: calls.append(len(x)) or linear(x, *rest)
    )
    model, inputs = tiny("bert"), batch("bert", lengths=(9, 9))
    counts = []
    for most in (2**30, 0):
        with undisturbed(model):
            _, replay = opened(model, inputs)
            replay.advance(1, most)
            calls.clear()
            replay.run(0, 2, {})
            counts.append(sum(calls))
    assert counts[0] < counts[1]


@pytest.mark.parametrize("offload", [False, True])
def test_a_stored_tensor_is_a_copy_and_gives_copies(offload):
    tensor = torch.arange(6.0).view(2, 3)
    stored = StoredTensor.of(tensor, offload)
    tensor.zero_()
    once = stored.folded(1)
    assert torch.equal(once, torch.arange(6.0).view(2, 3))
    once.zero_()
    assert torch.equal(stored.folded(2), torch.arange(6.0).view(2, 3).repeat(2, 1))
    blank = stored.blank()
    assert blank.nbytes == 4 and blank.folded(3).shape == (6, 3) and blank.folded(1).isnan().all()
    assert StoredTensor.of(torch.arange(3), offload).blank().nbytes == 24


def test_bad_memory():
    with pytest.raises(ValueError, match="max_memory must be a number of at least 1, got 0"):
        ada.predict_ranks(tiny("bert"), [batch("bert")], 8, max_memory=0)
