"""Whole training steps of causal LMs in real shapes: tokens a second that users get.

A step is forward, loss, backward and fused AdamW on synthetic tokens; the frozen base's ends at its
embeddings. Before a variant is timed, its gradients are held against float64 in a model of two
layers, and against PEFT's in the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

import adarank_fast as ada
from adarank_fast.benchmarking import arms
from bench.blocks import SHARES, with_scores
from bench.counts import SHAPES
from bench.gpu import rivals
from bench.gpu.checks import DEFAULT, LORA_SETS, choose
from bench.gpu.compiled import compile_plain_blocks
from bench.gpu.context import Context, Row
from bench.gpu.profiles import profiled
from bench.gpu.quantised import quantise
from bench.gpu.rows import QLORA, TRAINING, Training
from bench.gpu.timing import Step, reason, release

AVERAGE_RANK = 16
CHECKED = (1, 64)  # sequences and tokens of the model of two layers
REPETITIONS, LONGEST = 12, 25.0  # of each variant; seconds of one timer
WARM_UP = 3
COMPILING = 100.0  # seconds that must be left before something is compiled
FROM_FLOAT64 = 2.0  # times PEFT's error
FROM_PEFT = 0.1  # the difference of gradients in 16 bits, relative
SLACK = 1e-3
FROZEN, PEFT, OURS = "frozen", "PEFT", "ours"
PEFT32, OURS32 = "PEFT, float32", "ours, float32"
SAME = {OURS32: PEFT32}  # what a variant is held against, where that is not PEFT
GRAPHED = "graph_blocks"
Batch = dict[str, Tensor]
Made = Callable[[], nn.Module]


def config_of(kind: str, layers: int | None) -> PretrainedConfig:
    """Sizes of a real model, or of its first layers."""
    shape = SHAPES[kind]
    sizes = dict(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.query // shape.head,
        num_key_value_heads=shape.kv // shape.head,
        head_dim=shape.head,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.width < 4096,
        use_cache=False,
    )
    return Qwen3Config(**sizes) if kind.startswith("Qwen3") else LlamaConfig(**sizes)


def base_of(context: Context, made: Training, layers: int | None) -> nn.Module:
    """Random weights in the dtype of the run, quantised where the row says so; frozen."""
    torch.manual_seed(0)
    with context.device:
        model = AutoModelForCausalLM.from_config(
            config_of(made.kind, layers), dtype=context.dtype, attn_implementation="sdpa"
        )
    if made.base == "nf4":
        quantise(model)
    frozen = arms.frozen_copy(model.requires_grad_(False))
    if made.checkpointed:
        frozen.gradient_checkpointing_enable({"use_reentrant": False})
    return frozen.train()


def plan_of(model: nn.Module) -> ada.RankPlan:
    """Average rank 16 on every linear, mixed as AdaRank mixes them."""
    plan = ada.RankPlan.uniform(model, AVERAGE_RANK, "all-linear")
    shares = {name: SHARES[name.split(".")[-1].removesuffix("_proj")] for name in plan.ranks}
    return with_scores(plan, shares)


def batch_of(context: Context, made: Training, size: tuple[int, int]) -> Batch:
    """Random tokens; packed: four texts in a sequence, each with positions from 0."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, SHAPES[made.kind].vocabulary, size, generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if made.packed:
        quarter = -(-size[1] // 4)
        batch["position_ids"] = (torch.arange(size[1]) % quarter).expand(size).contiguous()
    return {key: value.to(context.device) for key, value in batch.items()}


@dataclass
class Variants:
    """What a row compares, made when it is asked for: adapters of all start from the same numbers.

    Attributes:
        makers: name -> makes the model.
        refused: name -> why it is not run.
    """

    makers: dict[str, Made]
    refused: dict[str, str | None]


def variants_of(context: Context, frozen: nn.Module, made: Training, batch: Batch) -> Variants:
    """Frozen, PEFT, ours; with `others` also what is compiled, patched by Liger, or a rival's."""
    plan, dtype = plan_of(frozen), context.dtype

    def peft(base: nn.Module = frozen, adapters: torch.dtype = dtype) -> nn.Module:
        torch.manual_seed(1)
        return arms.adapted(base, plan, adapters).train(frozen.training)

    def ours(**options: Any) -> nn.Module:
        return arms.fused(peft(**options), batch)

    makers: dict[str, Made] = {FROZEN: lambda: frozen, PEFT: peft, OURS: ours}
    if dtype != torch.float32:
        makers[PEFT32] = lambda: peft(adapters=torch.float32)
        makers[OURS32] = lambda: ours(adapters=torch.float32)
    makers["ours, recompute_mlp"] = lambda: ada.accelerate(peft(), batch, recompute_mlp=True)
    refused: dict[str, str | None] = {}
    if not made.others:
        return Variants(makers, refused)
    for rival in rivals.RIVALS:
        try:
            rivals.imported(rival.module, rival.entered)
        except rivals.NotRun as error:
            refused[rival.name] = str(error)
            continue
        makers[rival.name] = lambda rival=rival: rivals.swapped(rival, peft(), 0.0)
    try:
        patched = rivals.with_liger(arms.shared_copy(frozen))
        makers["frozen + Liger"] = lambda: patched
        makers["PEFT + Liger"] = lambda: peft(patched)
        makers["ours + Liger"] = lambda: ours(base=patched)
    except rivals.NotRun as error:
        refused["PEFT + Liger"] = refused["ours + Liger"] = str(error)
    mode = "reduce-overhead" if context.device.type == "cuda" else "default"
    makers[f"PEFT, {mode}"] = lambda: compile_plain_blocks(peft(), mode)
    makers[f"ours, {mode}"] = lambda: ada.compile_blocks(ours(), mode=mode)
    if context.device.type == "cuda":
        makers[f"PEFT, {GRAPHED}"] = lambda: ada.graph_blocks(peft())
        makers[f"ours, {GRAPHED}"] = lambda: ada.graph_blocks(ours())
    return Variants(makers, refused)


def check_small(context: Context, made: Training) -> dict[str, float | str]:
    """Each eager variant's error from float64 in a model of two layers, or why it is refused."""
    frozen = base_of(context, replace(made, base="dense", checkpointed=False), 2)
    batch = batch_of(context, replace(made, packed=False), CHECKED)
    found = variants_of(context, frozen, made, batch)
    peft = found.makers[PEFT]()
    exact = arms.gradients(copy.deepcopy(peft).double(), batch)
    theirs = arms.relative_error(arms.gradients(peft, batch), exact)
    errors: dict[str, float | str] = {PEFT: theirs}
    for name, make in found.makers.items():
        if name in (FROZEN, PEFT) or "frozen" in name or _is_compiled(name):
            continue
        try:
            error = arms.relative_error(arms.gradients(make(), batch), exact)
        except Exception as failure:
            errors[name] = f"check failed: {reason(failure)}"
            continue
        allowed = FROM_FLOAT64 * theirs + SLACK
        if error <= allowed:
            errors[name] = error
        else:
            errors[name] = f"check failed: error {error:.3g} above {allowed:.3g}"
    return errors


def _is_compiled(name: str) -> bool:
    """Or captured: checked in the model itself only, and not captured as a whole."""
    return name.endswith(("reduce-overhead", "default", GRAPHED))


def training_row(context: Context, row: str) -> list[Row]:
    """Every variant: checked, its loss after some steps, launches, memory, seconds, tokens/s."""
    made = (TRAINING | QLORA)[row]
    choose(context.device, context.sets(LORA_SETS).get(DEFAULT, ()))
    errors = check_small(context, made)
    release()
    batch = batch_of(context, made, (made.batch, made.tokens))
    frozen = base_of(context, made, made.layers)
    found = variants_of(context, frozen, made, batch)
    timed = replace(context, repetitions=min(context.repetitions, REPETITIONS), limit=LONGEST)
    rows: list[Row] = []
    reference: dict[str, list[Tensor]] = {}
    for name, make in found.makers.items():  # one at a time: each has its own graphs and memory
        facts: Row = {}
        why = errors.get(name)
        if isinstance(why, float):
            facts["error_in_float64"], why = why, None
        if context.left < (COMPILING if _is_compiled(name) else 0.0):
            why = "not run: no time was left"
        if why is None:
            why, step = _prepared(context, made, name, make, batch, reference, facts)
        if why is None:
            (measured,) = timed.measure(row, {name: step}, memory=True)
            _add_rates(measured, made, context)
        else:
            measured = {"row": row, "variant": name, "status": why}
        rows.append(measured | facts)
        step = None
        release()
    refusals = found.refused.items()
    return rows + [{"row": row, "variant": name, "status": str(why)} for name, why in refusals]


def _prepared(
    context: Context,
    made: Training,
    name: str,
    make: Made,
    batch: Batch,
    reference: dict[str, list[Tensor]],
    facts: Row,
) -> tuple[str | None, Any]:
    """Why it is not timed, or the step; what was found out on the way goes into `facts`."""
    try:
        model = make()
        if name == FROZEN or "frozen" in name:
            return None, training_step(context, model, batch)
        found = arms.gradients(model, batch)
        if name in (PEFT, PEFT32):
            reference[name] = found
        difference = arms.relative_error(found, reference[SAME.get(name, PEFT)])
        facts["difference_from_peft"] = difference
        if not difference <= FROM_PEFT:
            return f"check failed: gradients differ from PEFT's by {difference:.3g}", None
        step = training_step(context, model, batch, _is_compiled(name))
        if made.steps:
            losses = [float(_run(step)[0]) for _ in range(made.steps)]
            facts |= {"first_loss": losses[0], "last_loss": losses[-1], "loss_steps": made.steps}
        _run(step)
        step.before()
        if name.endswith(GRAPHED):
            for _ in range(WARM_UP):  # until every block is captured
                _run(step)
            facts["graphs"] = str(ada.graph_report(model))
        facts["launches"] = profiled(step.run, context.device)["launches"]
        return None, step
    except Exception as error:  # the other variants are still worth timing
        return reason(error), None


def _run(step: Step) -> list[Tensor]:
    step.before()
    return list(step.run() or ())


def training_step(
    context: Context, model: nn.Module, batch: Mapping[str, Tensor], compiled: bool = False
) -> Step:
    """Forward, loss, backward, AdamW; gradients are dropped outside, so that it can be captured."""
    parameters = arms.trainable(model)
    on_gpu = context.device.type == "cuda"
    optimiser = None
    if parameters:
        optimiser = torch.optim.AdamW(parameters, arms.RATE, fused=True, capturable=on_gpu)

    def before() -> None:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        for parameter in parameters:
            parameter.grad = None

    def run() -> list[Tensor]:
        loss = arms.loss_of(model, batch)
        loss.backward()
        if optimiser is not None:
            optimiser.step()
        return [loss.detach(), *(p.grad for p in parameters if p.grad is not None)]

    return Step(run, before, captured=not compiled)


def _add_rates(row: Row, made: Training, context: Context) -> None:
    tokens = made.batch * made.tokens
    row["tokens"] = tokens
    for timer in ("eager", "graph"):
        if seconds := row.get(f"{timer}_seconds"):
            row[f"{timer}_tokens_per_second"] = tokens / seconds
