"""Training steps of one block as the host issues them: PEFT, ours, and others' LoRA functions.

Kernels are chosen once, so that nothing but the step itself runs between two measurements. "host"
is the time until the last launch is issued, "eager" until the card has finished.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import torch
from torch import nn

from bench.blocks import ADAPTERS32, backward_of
from bench.counts import SHAPES
from bench.gpu import rivals
from bench.gpu.checks import DEFAULT, LORA_SETS, Named, choose, compare
from bench.gpu.context import Context, Row
from bench.gpu.rows import EAGER
from bench.gpu.steps import block_models, check_block, results
from bench.gpu.timing import Host, Step, refusal, release

LONGEST = 8.0  # seconds of one timer
FLOOR = 1e-2  # what others' functions may be off beside twice PEFT's rounding, relative


def eager_row(context: Context, row: str) -> list[Row]:
    """Every variant of a row, checked on fewer tokens, then timed."""
    kind, batch, tokens, dropout = EAGER[row]
    if context.device.type == "cuda":
        context = replace(context, tokens=(batch, tokens))
    models = block_models(context, kind, "all-linear", dropout)
    choose(context.device, context.sets(LORA_SETS).get(DEFAULT, ()))
    variants = {"frozen": models["frozen"], "PEFT": models["peft"], "ours": models["ours"]}
    if "peft default" in models:
        variants["PEFT, float32"] = models["peft default"]
        variants["ours, float32"] = models[ADAPTERS32]
    exact = results(context, kind, copy.deepcopy(models["peft"]).double())
    torchs = results(context, kind, models["peft"])
    refused: dict[str, str | None] = {}
    for name in ("ours", "ours, float32"):
        if name in variants:
            refused[name] = context.failure("grouped_lora_linear", DEFAULT) or refusal(
                functools.partial(check_block, context, kind, variants[name], torchs, exact)
            )
    for rival in rivals.RIVALS:
        try:
            variants[rival.name] = rivals.swapped(rival, copy.deepcopy(models["peft"]), dropout)
        except rivals.NotRun as error:
            refused[rival.name] = str(error)
            continue
        refused[rival.name] = refusal(
            functools.partial(_check, context, kind, variants[rival.name], torchs, exact)
        )
    del exact, torchs
    release()
    width = SHAPES[kind].width
    x, dy = (
        torch.randn(*context.tokens, width, device=context.device).to(context.dtype)
        for _ in range(2)
    )
    x.requires_grad_()
    steps = {}
    for name, model in variants.items():
        clear, run = backward_of(model.train(), x, dy)
        steps[name] = Step(run, clear)
    eager = context.timers()[0]
    timed = replace(context, timers=lambda: [eager, Host()], limit=LONGEST)
    return timed.measure(row, steps, memory=True, refused=refused)


def _check(context: Context, kind: str, model: nn.Module, torchs: Named, exact: Named) -> None:
    found = results(context, kind, model)
    compare(found, torchs, exact, floor=FLOOR, size=torch.Tensor.norm)
