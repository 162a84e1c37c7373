"""The disagreement of variants beside materialising all outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adarank_kernels import pairwise_disagreement
from bench.counts import SHAPES
from bench.gpu.checks import DISAGREEMENT_SETS, choose, compare
from bench.gpu.context import Context, Row
from bench.gpu.rows import DISAGREEMENTS
from bench.gpu.timing import Step, refusal, release
from bench.naive import materialised

K = 8
HEAD_TOKENS = 2048  # a variant


def disagreement_row(context: Context, row: str) -> list[Row]:
    """Eight variants through a real head, [8, 2048, V]: all pairs, or each against a reference.

    The op waits for the card once a chunk, so it cannot be captured.
    """
    kind, metric, against_one = DISAGREEMENTS[row]
    D, V = SHAPES[kind].width, SHAPES[kind].vocabulary
    generator = torch.Generator(context.device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=context.device)

    base = randn(HEAD_TOKENS, D)
    hidden = torch.stack([(base + 0.1 * randn(HEAD_TOKENS, D)).to(context.dtype) for _ in range(K)])
    weight = randn(V, D).mul_(D**-0.5).to(context.dtype)
    base = base.to(context.dtype)
    release()
    steps = {
        "materialised": Step(lambda: [materialised(hidden, weight, metric)], captured=False),
    }
    refused: dict[str, str | None] = {}
    reference: Tensor | None = None
    sample = hidden[:, :100]  # materialising itself must not need all its memory for the check
    if against_one:
        reference, steps = base, {}
        both = torch.cat([base[None, :100], sample])
        torchs = materialised(both, weight, metric)[0, 1:]
        expected = materialised(both.double(), weight.double(), metric)[0, 1:]
    else:
        torchs = materialised(sample, weight, metric)
        expected = materialised(sample.double(), weight.double(), metric)
    for label, kernels in context.sets(DISAGREEMENT_SETS).items():
        name = f"ours, {label}"
        choose(context.device, kernels)
        refused[name] = context.failure("pairwise_disagreement", label) or refusal(
            lambda: _check(sample, weight, metric, reference, torchs, expected)
        )

        def run(kernels: Any = kernels) -> list[Tensor]:
            return [pairwise_disagreement(hidden, weight, metric=metric, reference=reference)]

        def before(kernels: Any = kernels) -> None:
            choose(context.device, kernels)

        steps[name] = Step(run, before, captured=False)
    return context.measure(row, steps, memory=True, refused=refused)


def _check(
    hidden: Tensor,
    weight: Tensor,
    metric: str,
    reference: Tensor | None,
    torchs: Tensor,
    expected: Tensor,
) -> None:
    """Whether it is as near to float64 as materialising in the same dtype, twice over."""
    if reference is not None:
        reference = reference[: hidden.shape[1]]
    ours = pairwise_disagreement(hidden, weight, metric=metric, reference=reference)
    compare({"d": ours}, {"d": torchs}, {"d": expected})
