"""What training steps compare: a block in the shapes of a real model, and its variants.

The variants: frozen, PEFT with mixed ranks, ours, ours with uniform ranks of as many parameters; on
a bfloat16 base also PEFT's default, float32 adapters, and ours with these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

import adarank_fast as ada
from bench.counts import SHAPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAPTERS32 = "ours, float32 adapters"
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
        return x + self.feed_forward(self.norm2(x))

    def feed_forward(self, h: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(nn.functional.gelu(self.up(h)))
        return self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def adapted(
    block: Block, targets: str, average_rank: int, mixed: bool, **lora_config: Any
) -> nn.Module:
    """A PEFT model of a copy of the block: the same adapter parameters whether mixed or uniform."""
    names = [name for name in TARGETS[targets] if getattr(block, name) is not None]
    plan = ada.RankPlan.uniform(block, average_rank, target_modules=names)
    if mixed:
        plan = with_scores(plan, {name: SHARES[name] for name in plan.ranks})
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(block), plan.to_lora_config(**lora_config))
    return trained_a_little(model)


def with_scores(plan: ada.RankPlan, scores: Mapping[str, float], **bounds: int) -> ada.RankPlan:
    """As many parameters as in `plan`, in proportion to the scores."""
    sizes = plan.sizes
    ranks = ada.allocate_ranks(scores, budget_parameters=plan.parameters, sizes=sizes, **bounds)
    return ada.RankPlan(ranks, sizes)


def trained_a_little(model: nn.Module) -> nn.Module:
    """No B is zero any more, in place."""
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


def variants(
    frozen: nn.Module,
    make: Callable[[torch.dtype, bool], nn.Module],
    fused: Callable[[nn.Module], nn.Module],
    dtype: torch.dtype,
) -> dict[str, nn.Module]:
    """Every variant on a base of `dtype`.

    Args:
        frozen: the base alone.
        make: a PEFT model, of the adapters' dtype and whether its ranks are mixed.
        fused: the fused copy of a PEFT model.
    """
    models = {"frozen": frozen, "peft": make(dtype, True)}
    if dtype != torch.float32:
        models["peft default"] = make(torch.float32, True)
        models[ADAPTERS32] = fused(models["peft default"])
    models["ours"] = fused(models["peft"])
    models["ours, uniform"] = fused(make(dtype, False))
    return models


def block_variants(
    block: Block, targets: str, average_rank: int, dtype: torch.dtype, **lora_config: Any
) -> dict[str, nn.Module]:
    """Every variant of a float32 block, on a base of `dtype`."""

    def make(adapters: torch.dtype, mixed: bool) -> nn.Module:
        model = adapted(block, targets, average_rank, mixed, **lora_config)
        return model.to(dtype) if adapters == dtype else cast_base(model, dtype)

    def fused(model: nn.Module) -> nn.Module:
        return ada.accelerate(copy.deepcopy(model))

    return variants(copy.deepcopy(block).to(dtype), make, fused, dtype)


def backward_of(
    model: nn.Module, x: Tensor, dY: Any
) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    """What drops the gradients, and a forward and backward pass, which returns new ones."""
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    def run() -> list[Tensor]:
        torch.autograd.backward(model(x), dY)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    return clear, run


def step_of(model: nn.Module, x: Tensor, dY: Any) -> Callable[[], list[Tensor]]:
    """Both."""
    clear, run = backward_of(model, x, dY)

    def step() -> list[Tensor]:
        clear()
        return run()

    return step


def check(
    models: Mapping[str, nn.Module],
    computed: Callable[[nn.Module], list[Tensor]],
    tolerance: float,
) -> None:
    """No time is reported for a step that computes something else."""
    pairs = {"ours": "peft", ADAPTERS32: "peft default"}
    for ours, theirs in ((ours, theirs) for ours, theirs in pairs.items() if ours in models):
        computed(models[ours])  # the first forward finds out who shares an input
        for found, wanted in zip(computed(models[ours]), computed(models[theirs]), strict=True):
            error = ((found - wanted).norm() / wanted.norm()).item()
            if not error <= tolerance:
                raise ArithmeticError(f"{ours} differs from {theirs} by {error:.2g}")
        if (share := ada.fusion_report(models[ours]).fused_share) != 1.0:
            raise ArithmeticError(f"{ours}: {share:.1%} of the calls were fused")
