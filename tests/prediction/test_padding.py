import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.models.batches import prepare_batches
from adarank_fast.models.forward_patching import undisturbed
from adarank_fast.models.outputs import choose_output
from adarank_fast.prediction.padding import remove_padding
from tests.tiny_models import batch, tiny


def split(model, batches):
    with undisturbed(model):
        batches = prepare_batches(model, batches)
        return remove_padding(model, choose_output(model, "auto", batches[0]), batches)


@pytest.mark.parametrize(
    ("cost", "widths"), [(0, [3, 8, 9, 20]), (12, [3, 9, 20]), (40, [9, 20]), (1000, [20])]
)
def test_items_of_like_length_go_together_and_lose_their_padding(monkeypatch, cost, widths):
    monkeypatch.setattr("adarank_fast.prediction.padding.BATCH_COST", {"cpu": cost})
    first = batch("bert", lengths=(20, 3, 9, 3), width=24)
    second = batch("bert", lengths=(8, 20, 3), width=24, seed=1)
    parts = split(tiny("bert"), [first, second])
    assert [p["input_ids"].shape[1] for p in parts] == widths
    assert sum(len(p["input_ids"]) for p in parts) == 7
    ids = [r[: m.sum()].tolist() for p in parts for r, m in zip(*items(p), strict=True)]
    given = [r[: m.sum()].tolist() for p in (first, second) for r, m in zip(*items(p), strict=True)]
    assert sorted(ids) == sorted(given)


def test_a_16_bit_model_loses_its_padding_too():
    """Its pooled output is read in float32, with 16 bits' rounding."""
    inputs = [batch("bert", lengths=(20, 3, 9, 3), width=24)]
    assert len(split(tiny("bert").bfloat16(), inputs)) == len(split(tiny("bert"), inputs)) > 1


def items(inputs):
    return inputs["input_ids"], inputs["attention_mask"]


def test_what_cannot_be_trimmed_stays():
    model = tiny("llama")
    left = {k: v.flip(1) for k, v in batch("llama", lengths=(5, 3)).items()}
    assert len(split(model, [left])) == 1
    square = batch("bert", lengths=(5, 3))
    square["position_ids"] = torch.arange(5)[None]
    assert len(split(tiny("bert"), [square])) == 1


class Average(nn.Module):
    """Reads its padding."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, attention_mask):
        return self.linear(x).mean(1)


def test_a_model_that_reads_its_padding_keeps_it():
    mask = (torch.arange(20) < torch.tensor([20, 5, 9])[:, None]).long()
    inputs = {"x": torch.randn(3, 20, 4), "attention_mask": mask}
    assert len(split(Average(), [inputs])) == 1


@pytest.mark.parametrize("output", ["auto", "last_hidden_state", "pooler"])
def test_the_plan_is_that_of_unpadded_items(output):
    model, lengths = tiny("bert"), (20, 3, 9)
    padded = batch("bert", lengths=lengths)
    alone = [{k: v[i : i + 1, :n] for k, v in padded.items()} for i, n in enumerate(lengths)]
    together = ada.predict_ranks(model, [padded], 8, output=output, trials=2, progress=False)
    apart = ada.predict_ranks(model, alone, 8, output=output, trials=2, progress=False)
    assert together.ranks == apart.ranks
    for name, score in together.scores.items():
        # abs: float32's rounding of outputs near 0.3, which disagreements of 4e-4 show
        assert apart.scores[name].trials == pytest.approx(score.trials, rel=1e-5, abs=3e-8)


def test_the_item_with_the_most_padding_is_tried():
    wide = {"x": torch.randn(2, 20, 4), "attention_mask": torch.ones(2, 20).long()}
    mask = (torch.arange(16) < torch.tensor([2, 16])[:, None]).long()
    narrow = {"x": torch.randn(2, 16, 4), "attention_mask": mask}
    assert len(split(Average(), [wide, narrow])) == 2


def test_a_decoder_keeps_its_positions():
    model, inputs = tiny("t5"), batch("t5", lengths=(9, 3, 4, 9))
    inputs["decoder_input_ids"] = batch("t5", seed=4)["input_ids"]  # as wide as the encoder's
    together = ada.predict_ranks(model, [inputs], 8, trials=1, progress=False)
    whole = ada.predict_ranks(
        model, [inputs], 8, output=lambda o: o.logits, trials=1, progress=False
    )
    for name, score in whole.scores.items():
        assert together.scores[name].mean == pytest.approx(score.mean, rel=1e-5)
