"""Whole predictions of models in real shapes, weights random: ours, and the naive loop."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from adarank_fast.prediction import prober
from bench.counts import SHAPES, Shape
from bench.gpu.checks import choose
from bench.gpu.context import Context, Row
from bench.gpu.rows import MEMORIES, PREDICTIONS
from bench.gpu.timing import Step, refusal, release
from bench.naive import Problem, across

# items, tokens an item: short questions of an encoder, text of a language model
ENCODED, WRITTEN, CHECKED = (64, 16), (8, 256), (2, 24)
CHECKS, SAMPLE = 6, 12  # probes of the naive loop: compared in float64; timed
REPETITIONS, LONGEST = 5, 20.0  # a variant, and seconds for all of them
APART = "blocks apart"
KERNELS = ("disagreement_pairs", "philox_normal")


def prediction_row(context: Context, row: str) -> list[Row]:
    """The naive loop, extrapolated from a sample of its probes, and `predict_ranks`.

    Checked in float32: the first trial of modules across the depth is what the naive loop finds in
    float64, to 1e-5 or twice what the naive loop in float32 is off. Timed in the dtype of the run.
    Nothing can be captured.
    """
    kind, targets, trials = PREDICTIONS[row]
    small = problem_of(context, kind, targets, trials, CHECKED)
    why = refusal(lambda: check(small))
    small.model.to(context.dtype)
    release()
    size = WRITTEN if SHAPES[kind].gated else ENCODED
    problem = replace(small, batch=tokens(context, SHAPES[kind], size))
    sample, probes = across(problem.modules, SAMPLE), len(problem.modules) * trials

    def forward() -> None:
        with torch.no_grad():
            problem.model(**problem.batch)

    def naive() -> None:
        problem.naive(sample, precise=False)

    def ours(max_memory: int | None = None) -> None:
        problem.predict(max_memory=max_memory)

    steps = {
        "one forward": Step(forward, captured=False),
        f"naive loop, {probes} probes": Step(naive, calls=len(sample) / probes, captured=False),
        "ours": Step(ours, captured=False),
    }
    steps[f"ours, {APART}"] = Step(partial(apart, problem), captured=False)
    for said, memory in MEMORIES.items():
        steps[f"ours, {said}"] = Step(partial(ours, memory), captured=False)
    fewer = replace(context, repetitions=min(context.repetitions, REPETITIONS), limit=LONGEST)
    refused = {name: why for name in steps if name.startswith("ours")}
    return fewer.measure(row, steps, memory=True, refused=refused)


def apart(problem: Problem) -> None:
    """A prediction that never joins blocks whose work is little."""
    with patch.object(prober, "joined_rows", lambda *_: 0):
        problem.predict()


def problem_of(
    context: Context, kind: str, targets: str, trials: int, size: tuple[int, int] | None = None
) -> Problem:
    """A model in float32 and its batch; kernels that passed their checks are chosen."""
    shape = SHAPES[kind]
    choose(context.device, [k for k in KERNELS if not context.failure(k)])
    with context.device:
        model = model_of(shape).eval()
    options = {"target_modules": targets, "metric": "tv" if shape.gated else "l1"}
    options["trials"] = trials
    return Problem(model, tokens(context, shape, size or WRITTEN), options)


def check(problem: Problem) -> None:
    """Whether its scores are those of the naive loop."""
    sample = across(problem.modules, CHECKS)
    exact = replace(problem, model=copy.deepcopy(problem.model).double()).naive(sample)
    torchs, scores = problem.naive(sample), problem.predict(trials=1).scores
    rounding = max(abs(torchs[name] - value) for name, value in exact.items())
    for name, value in exact.items():
        error, allowed = abs(scores[name].trials[0] - value), 1e-5 * value + 2 * rounding
        if not error <= allowed:
            raise ArithmeticError(f"{name}: error {error:.3g} above {allowed:.3g}")


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


def tokens(context: Context, shape: Shape, size: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, shape.vocabulary, size, generator=generator).to(context.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
