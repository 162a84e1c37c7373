"""The disagreement of variants beside materialising all outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adarank_kernels import pairwise_disagreement
from bench.counts import SHAPES
from bench.gpu.checks import DISAGREEMENT_SETS, choose
from bench.gpu.context import Context, Row
from bench.gpu.rows import DISAGREEMENTS
from bench.gpu.timing import Step, release, said_of_check
from bench.materialised import materialised

K = 8
HEAD_TOKENS = 2048  # a variant


def disagreement_row(context: Context, row: str) -> list[Row]:
    """Eight variants through a real head, [8, 2048, V]: time and extra memory.

    The op waits for the card once a chunk, so it cannot be captured.
    """
    kind, metric = DISAGREEMENTS[row]
    D, V = SHAPES[kind].width, SHAPES[kind].vocabulary
    generator = torch.Generator(context.device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=context.device)

    base = randn(HEAD_TOKENS, D)
    hidden = torch.stack([(base + 0.1 * randn(HEAD_TOKENS, D)).to(context.dtype) for _ in range(K)])
    weight = randn(V, D).mul_(D**-0.5).to(context.dtype)
    del base
    release()
    steps = {
        "materialised": Step(lambda: [materialised(hidden, weight, metric)], captured=False),
    }
    refused: dict[str, str] = {}
    sample = hidden[:, :100]  # materialising itself must not need all its memory for the check
    expected = materialised(sample.double(), weight.double(), metric)
    for label, kernels in context.sets(DISAGREEMENT_SETS).items():
        name = f"ours, {label}"
        why = context.failure("pairwise_disagreement", label)
        choose(context.device, kernels)
        why = why or _refusal(sample, weight, metric, expected)
        if why:
            refused[name] = why
            continue

        def run(kernels: Any = kernels) -> list[Tensor]:
            return [pairwise_disagreement(hidden, weight, metric=metric)]

        def before(kernels: Any = kernels) -> None:
            choose(context.device, kernels)

        steps[name] = Step(run, before, captured=False)
    rows = context.measure(row, steps, memory=True)
    return rows + [{"row": row, "variant": n, "status": why} for n, why in refused.items()]


def _refusal(hidden: Tensor, weight: Tensor, metric: str, expected: Tensor) -> str | None:
    """Whether [K, K] is as near to float64 as materialising in the same dtype, twice over."""
    try:
        ours = pairwise_disagreement(hidden, weight, metric=metric).double()
        torchs = materialised(hidden, weight, metric).double()
        error, allowed = (ours - expected).abs().max(), 2 * (torchs - expected).abs().max() + 1e-6
        if not error <= allowed:
            raise ArithmeticError(f"error {error:.3g} above {allowed:.3g}")
    except Exception as failure:
        release()
        return said_of_check(failure)
    return None
