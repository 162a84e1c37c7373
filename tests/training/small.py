"""A small Llama with adapters of mixed ranks, and what the trainers' tests compare."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.tiny_models import VOCABULARY, batch, tiny

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUPS = {1, 2, 3}  # sizes of a Llama's groups: o and down alone, gate and up, q k v


def mixed_llama(lora_dropout: float = 0.0) -> PeftModel:
    """Plain PEFT, ranks 1 to 7 in turn, the same weights at every call, B not zero."""
    config = LoraConfig(
        r=4,
        target_modules=TARGETS,
        rank_pattern={name: 1 + 2 * (i % 4) for i, name in enumerate(TARGETS)},
        alpha_pattern={name: 3 + i for i, name in enumerate(TARGETS)},
        lora_dropout=lora_dropout,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(3)
    peft_model = get_peft_model(tiny("llama", layers=2), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft_model.train()


def inputs(seed: int, rows: int = 4) -> dict[str, Any]:
    """A batch without padding, so that a mean over it is the mean of its halves' means."""
    out = batch("llama", lengths=(9,) * rows, seed=seed)
    return {**out, "labels": out["input_ids"]}


def items(count: int) -> list[dict[str, list[int]]]:
    """What a Trainer's dataset holds: sequences of one length."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(3, VOCABULARY, (count, 9), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 9, "labels": row} for row in rows]


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def assert_near(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Every tensor within `tolerance` of its norm."""
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        gap, size = (tensor - theirs[name]).norm(), theirs[name].norm()
        assert gap <= tolerance * size + 1e-9, f"{name}: {gap:.3g} of {size:.3g}"
