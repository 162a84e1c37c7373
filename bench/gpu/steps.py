"""Training steps of one transformer block: frozen base, PEFT, ours with each choice of kernels."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

import adarank_fast as ada
from bench.blocks import ADAPTERS32, Block, backward_of, block_variants
from bench.counts import SHAPES
from bench.gpu.checks import DEFAULT, LORA_SETS, Named, choose, compare
from bench.gpu.context import Context, Row
from bench.gpu.rows import BLOCKS
from bench.gpu.timing import Step, refusal, release

AVERAGE_RANK = 16
CHECKED_TOKENS = 250  # no multiple of a tile; in float64, so not many


def block_row(context: Context, row: str) -> list[Row]:
    """Every variant of a row, checked on fewer tokens, then timed."""
    kind, targets, dropout = BLOCKS[row]
    models = block_models(context, kind, targets, dropout)
    labels = context.sets(LORA_SETS)
    best = DEFAULT if DEFAULT in labels else "vendor GEMMs"
    variants: dict[str, tuple[nn.Module, str]] = {
        name: (models[name], "vendor GEMMs") for name in ("frozen", "peft")
    }
    variants |= {f"ours, {label}": (models["ours"], label) for label in labels}
    if "peft default" in models:
        variants["peft, float32 adapters"] = models["peft default"], "vendor GEMMs"
        variants[f"ours, float32 adapters, {best}"] = models[ADAPTERS32], best

    exact = results(context, kind, copy.deepcopy(models["peft"]).double())
    torchs = results(context, kind, models["peft"])
    refused: dict[str, str | None] = {}
    for name, (model, label) in variants.items():
        if name.startswith("ours"):
            choose(context.device, labels[label])
            refused[name] = context.failure("grouped_lora_linear", label) or refusal(
                functools.partial(check_block, context, kind, model, torchs, exact)
            )
    del exact, torchs
    release()

    width = SHAPES[kind].width
    x, dy = (torch.randn(*context.tokens, width, device=context.device) for _ in range(2))
    x, dy = x.to(context.dtype).requires_grad_(), dy.to(context.dtype)
    steps = {
        name: training_step(context, model.train(), labels[label], x, dy)
        for name, (model, label) in variants.items()
    }
    return context.measure(row, steps, memory=True, refused=refused)


def block_models(context: Context, kind: str, targets: str, dropout: float) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    with torch.device(context.device):
        block = Block(kind).requires_grad_(False)
        return block_variants(block, targets, AVERAGE_RANK, context.dtype, lora_dropout=dropout)


def training_step(
    context: Context, model: nn.Module, kernels: tuple[str, ...], x: Tensor, dy: Tensor
) -> Step:
    """Forward and backward with these kernels; gradients are dropped and kernels chosen outside."""
    clear, run = backward_of(model, x, dy)

    def before() -> None:
        choose(context.device, kernels)
        clear()

    return Step(run, before)


def results(context: Context, kind: str, model: nn.Module) -> Named:
    """Output and gradients in the dtype of the base, without dropout."""
    generator = torch.Generator().manual_seed(2)
    size = (1, CHECKED_TOKENS, SHAPES[kind].width)
    x, dy = (torch.randn(size, generator=generator) for _ in range(2))
    dtype = next(p.dtype for name, p in model.named_parameters() if "lora_" not in name)
    x, dy = (t.to(context.dtype).to(context.device, dtype) for t in (x, dy))
    named = {"x": x.requires_grad_()}
    named |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.eval()
    for _ in range(2):  # the first forward finds out who shares an input
        y = model(x)
        grads = torch.autograd.grad(y, list(named.values()), dy)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(named, grads, strict=True)}


def check_block(context: Context, kind: str, model: nn.Module, torchs: Named, exact: Named) -> None:
    compare(results(context, kind, model), torchs, exact, size=torch.Tensor.norm)
    if ada.fusion_report(model).fused_share < 1:
        raise ArithmeticError("not every call was fused")
