"""Whole predictions of models in real shapes, weights random: ours, and the naive loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import adarank_fast as ada
from adarank_fast.models.outputs import mean_pool
from bench.counts import SHAPES, Shape
from bench.gpu.checks import choose
from bench.gpu.context import Context, Row
from bench.gpu.rows import PREDICTIONS
from bench.gpu.timing import Step, refusal, release
from bench.naive import across, naive_disagreements

# items, tokens an item: short questions of an encoder, text of a language model
ENCODED, WRITTEN, CHECKED = (64, 16), (8, 256), (2, 24)
CHECKS, SAMPLE = 6, 12  # probes of the naive loop: compared in float64; timed
REPETITIONS = 5
KERNELS = ("disagreement_pairs", "philox_normal")


def prediction_row(context: Context, row: str) -> list[Row]:
    """The naive loop, extrapolated from a sample of its probes, and `predict_ranks`.

    Checked in float32: the first trial of modules across the depth is what the naive loop finds in
    float64, to 1e-5 or twice what the naive loop in float32 is off. Timed in the dtype of the run.
    Nothing can be captured.
    """
    kind, targets, trials = PREDICTIONS[row]
    shape = SHAPES[kind]
    choose(context.device, [k for k in KERNELS if not context.failure(k)])
    with context.device:
        model = model_of(shape).eval()
    modules = {t.name: t.path for t in ada.find_targets(model, targets)}
    metric = "tv" if shape.gated else "l1"
    why = refusal(lambda: _check(context, model, shape, modules, targets, metric))
    model.to(context.dtype)
    release()

    batch = tokens(context, shape, WRITTEN if shape.gated else ENCODED)
    sample = across(modules, SAMPLE)
    mask = "attention_mask" if shape.gated else None

    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    def naive() -> None:
        naive_disagreements(
            model, [batch], sample, _read, 1, mask=mask, metric=metric, precise=False
        )

    def ours() -> None:
        predict(model, batch, targets, metric, trials)

    probes = len(modules) * trials
    steps = {
        "one forward": Step(forward, captured=False),
        f"naive loop, {probes} probes": Step(naive, calls=len(sample) / probes, captured=False),
        "ours": Step(ours, captured=False),
    }
    fewer = replace(context, repetitions=min(context.repetitions, REPETITIONS))
    return fewer.measure(row, steps, memory=True, refused={"ours": why})


def model_of(shape: Shape) -> nn.Module:
    """A sentence encoder, or a language model where the feed-forward is gated."""
    sizes = dict(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query // shape.head,
        vocab_size=shape.vocabulary,
    )
    torch.manual_seed(0)
    if shape.gated:
        heads = dict(num_key_value_heads=shape.kv // shape.head, head_dim=shape.head)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    return BertModel(BertConfig(**sizes), add_pooling_layer=False)


def predict(
    model: nn.Module, batch: Mapping[str, Any], targets: str, metric: str, trials: int
) -> ada.RankPlan:
    return ada.predict_ranks(
        model, [batch], 8, target_modules=targets, metric=metric, trials=trials, progress=False
    )


def tokens(context: Context, shape: Shape, size: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, shape.vocabulary, size, generator=generator).to(context.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _read(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    if "logits" in outputs:
        return outputs.logits
    return mean_pool(outputs.last_hidden_state, batch["attention_mask"])


def _check(
    context: Context,
    model: nn.Module,
    shape: Shape,
    modules: Mapping[str, str],
    targets: str,
    metric: str,
) -> None:
    """Whether its scores are those of the naive loop."""
    batch = tokens(context, shape, CHECKED)
    sample = across(modules, CHECKS)
    mask = "attention_mask" if shape.gated else None

    def naive(model: nn.Module) -> dict[str, float]:
        found = naive_disagreements(model, [batch], sample, _read, 1, mask=mask, metric=metric)
        return {name: trials[0] for name, trials in found.items()}

    exact, torchs = naive(copy.deepcopy(model).double()), naive(model)
    rounding = max(abs(torchs[name] - value) for name, value in exact.items())
    scores = predict(model, batch, targets, metric, 1).scores
    for name, value in exact.items():
        error, allowed = abs(scores[name].trials[0] - value), 1e-5 * value + 2 * rounding
        if not error <= allowed:
            raise ArithmeticError(f"{name}: error {error:.3g} above {allowed:.3g}")
