"""A transformer block in the shapes of a real model, frozen or with adapters of mixed ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

import adarank_fast as ada
from bench.counts import SHAPES

TARGETS = {
    "attention": ["q", "k", "v", "o"],
    "all-linear": ["q", "k", "v", "o", "gate", "up", "down"],
}
# shares of the average rank, as AdaRank gives them on real models: values and outputs first
SHARES = {"q": 0.5, "k": 0.5, "v": 1.75, "o": 1.25, "gate": 0.75, "up": 1.0, "down": 1.5}


class Block(nn.Module):
    """Attention and feed-forward of one layer in the shapes of a real model, weights random."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        shape = SHAPES[kind]
        width, kv, inner = shape.width, shape.kv, shape.inner
        self.heads, self.kv_heads = shape.query // shape.head, kv // shape.head
        bias = not shape.gated
        self.q = nn.Linear(width, shape.query, bias=bias)
        self.k = nn.Linear(width, kv, bias=bias)
        self.v = nn.Linear(width, kv, bias=bias)
        self.o = nn.Linear(shape.query, width, bias=bias)
        self.gate = nn.Linear(width, inner, bias=bias) if shape.gated else None
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q = self.q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k(h).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v(h).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, enable_gqa=self.heads != self.kv_heads
        )
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        inner = nn.functional.silu(self.gate(h)) * self.up(h) if self.gate is not None else None
        return x + self.down(nn.functional.gelu(self.up(h)) if inner is None else inner)


def adapted(
    block: Block, targets: str, average_rank: int, mixed: bool, **lora_config: Any
) -> nn.Module:
    """A PEFT model of a copy of the block: the same adapter parameters whether mixed or uniform."""
    names = [name for name in TARGETS[targets] if getattr(block, name) is not None]
    uniform = ada.RankPlan.uniform(block, average_rank, target_modules=names)
    plan = uniform
    if mixed:
        ranks = ada.allocate_ranks(
            {name: SHARES[name] for name in uniform.ranks},
            budget_parameters=uniform.parameters,
            sizes=uniform.sizes,
        )
        plan = ada.RankPlan(ranks, uniform.sizes)
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(block), plan.to_lora_config(**lora_config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def cast_base(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The base in `dtype`, in place; the adapters stay float32, as PEFT keeps them."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    return model
