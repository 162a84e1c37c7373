"""K models, or K adapters on one base, against the outputs formed in full."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import adarank_fast as ada
from adarank_kernels import pairwise_disagreement_ref
from tests.tiny_models import batch, tiny

BATCHES = {kind: [batch(kind), batch(kind, lengths=(6, 3), seed=1)] for kind in ("bert", "llama")}


def moved(model, seed):
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    for name, p in other.named_parameters():
        if "lora_B" in name or "lora" not in name and seed:
            p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    return other


@torch.no_grad()
def formed(models, batches, metric):
    outputs = [
        torch.cat([m(**b).logits[b["attention_mask"].bool()] for b in batches]) for m in models
    ]
    return pairwise_disagreement_ref(torch.stack(outputs).double(), metric=metric)


@pytest.mark.parametrize("metric", ["l1", "tv", "kl", "js", "argmax"])
def test_models(metric):
    models = [moved(tiny("llama"), seed) for seed in range(3)]
    found = ada.model_disagreement(models, BATCHES["llama"], metric=metric)
    assert found.shape == (3, 3) and found.dtype == torch.float64
    expected = formed(models, BATCHES["llama"], metric)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-10)
    assert found.diagonal().abs().max() == 0


def test_pooled_hidden_states():
    models = [moved(tiny("bert"), seed) for seed in range(2)]
    found = ada.model_disagreement(models, BATCHES["bert"])
    total = items = 0
    for b in BATCHES["bert"]:
        mask = b["attention_mask"][..., None]
        with torch.no_grad():
            a, c = ((m(**b).last_hidden_state * mask).sum(1) / mask.sum(1) for m in models)
        total, items = total + (a - c).abs().mean(1).sum(), items + len(mask)
    assert found[0, 1].item() == pytest.approx((total / items).item(), rel=1e-5)


@pytest.mark.parametrize("layers", [None, [1, 2]])
@pytest.mark.parametrize("fused", [False, True])
def test_adapters_of_one_base(layers, fused):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, layers_to_transform=layers)
    model = get_peft_model(tiny("llama"), config, adapter_name="a")
    model.add_adapter("b", config)
    model.add_adapter("c", config)
    model = moved(model, 7)
    if fused:
        ada.accelerate(model)
    model.train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    found = ada.model_disagreement(model, BATCHES["llama"], adapters=["a", "b", "c"], metric="tv")
    assert model.active_adapter == "a" and model.training
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    models = []
    for name in "abc":
        models.append(copy.deepcopy(model).eval())
        models[-1].set_adapter(name)
    torch.testing.assert_close(
        found, formed(models, BATCHES["llama"], "tv").double(), rtol=1e-5, atol=1e-10
    )


def test_bad_input():
    model = tiny("bert")
    with pytest.raises(ValueError, match="at least two"):
        ada.model_disagreement([model], BATCHES["bert"])
    with pytest.raises(ValueError, match="must name at least two adapters"):
        ada.model_disagreement(model, BATCHES["bert"], adapters=["a", "b"])
    with pytest.raises(ValueError, match="metric='l2' is unknown"):
        ada.model_disagreement([model, model], BATCHES["bert"], metric="l2")
    with pytest.raises(ValueError, match=r"models\[1\] gives an output of shape \[2, 64\]"):
        ada.model_disagreement(
            [tiny("llama"), tiny("llama", width=64)],
            [{"input_ids": torch.ones(2, 3).long(), "output_hidden_states": True}],
            output=lambda outputs: outputs.hidden_states[-1][:, 0],
        )
