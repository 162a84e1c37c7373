"""Mixed-rank PEFT models, their losses and gradients: shared by the tests of fused layers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adarank_fast as ada
from tests.tiny_models import batch, tiny

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}


def mixed(kind, lora_dropout=0.0, **kwargs):
    """A PEFT model with ranks from 1 to 7 in turn, B not zero."""
    model = tiny(kind, layers=2)
    targets = TARGETS[kind]
    config = LoraConfig(
        r=4,
        target_modules=targets,
        rank_pattern={name: 1 + 2 * (i % 4) for i, name in enumerate(targets)},
        alpha_pattern={name: 3 + i for i, name in enumerate(targets)},
        lora_dropout=lora_dropout,
        **{"fan_in_fan_out": kind == "gpt2", **kwargs},
    )
    torch.manual_seed(3)
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft_model.train()


def loss_of(model, kind, seed=0):
    inputs = batch(kind, seed=seed)
    if kind == "bert":
        hidden = model(**inputs).last_hidden_state
        return (hidden * torch.linspace(-1, 1, hidden.shape[-1])).tanh().mean()
    labels = inputs["decoder_input_ids"] if kind == "t5" else inputs["input_ids"]
    return model(**inputs, labels=labels).loss


def gradients(model, kind, seed=11):
    model.zero_grad()
    torch.manual_seed(seed)  # the models have dropout of their own
    loss = loss_of(model, kind)
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_equal(first, second, tolerance=1e-5):
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    assert first[1].keys() == second[1].keys()
    for name, grad in first[1].items():
        assert (grad - second[1][name]).norm() <= tolerance * second[1][name].norm() + 1e-9, name


def fusable(model):
    return [m for m in model.modules() if hasattr(m, "_adarank")]


def accelerated(**kwargs):
    return ada.accelerate(mixed("llama", **kwargs), example=batch("llama"))


def reasons(model):
    return set().union(*(layer.reasons for layer in ada.fusion_report(model).values()))


def logits(model):
    with torch.no_grad():
        return model(**batch("llama")).logits
