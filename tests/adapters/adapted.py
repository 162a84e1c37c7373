"""Plans of mixed ranks, adapters that look trained, and what is read off them."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

import adarank_fast as ada
from adarank_fast.models.targets import find_targets
from adarank_fast.plan.rank_plan import RankPlan
from tests.tiny_models import tiny

RANKS = (0, 1, 3, 5, 11)


def mixed_plan(model, target_modules="all-linear", ranks=RANKS):
    """Different ranks next to each other; some are 0."""
    targets = find_targets(model, target_modules)
    sizes = {t.name: (t.in_features, t.out_features) for t in targets}
    chosen = {name: ranks[(3 * i + i // 5) % len(ranks)] for i, name in enumerate(sizes)}
    return RankPlan(chosen, sizes, settings={"base_model_prefix": "model."})


def randomise(peft_model):
    """As if trained: B is no longer zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return peft_model


def adapted(kind, scaling="constant", target_modules="all-linear", **kwargs):
    model = tiny(kind)
    return randomise(ada.inject(model, mixed_plan(model, target_modules), scaling, **kwargs))


def output(model, inputs):
    with torch.no_grad():
        found = model.eval()(**inputs)
    return found.logits if "logits" in found else found.last_hidden_state


def shapes_in(folder):
    return {k: tuple(t.shape) for k, t in load_file(folder / "adapter_model.safetensors").items()}


def adapters_in(peft_model, adapter="default"):
    """path -> (rows of A, columns of B, scale), read off the layers themselves."""
    return {
        path: (
            layer.lora_A[adapter].weight.shape[0],
            layer.lora_B[adapter].weight.shape[1],
            layer.scaling[adapter],
        )
        for path, layer in peft_model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }
