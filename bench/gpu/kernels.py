"""Each Triton kernel by itself, beside plain PyTorch on the same operands, in shares of the card.

Operands are gone through in turn, so that none waits in the card's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adarank_kernels.disagreement import metrics, op
from adarank_kernels.lora.backends.torch import scaled_mm
from adarank_kernels.random.philox import fill_in_torch
from adarank_kernels.random.words import key_tensor
from adarank_kernels.runtime.registry import HAS_TRITON
from bench import counts
from bench.counts import SHAPES, Cost, drop, expand, pairs, product
from bench.gpu.checks import choose, runs_kernels
from bench.gpu.context import Context, Row
from bench.gpu.rows import GROUPS, PAIRS, PHILOX
from bench.gpu.timing import Step, copies, rotating

if HAS_TRITON:
    from adarank_kernels.disagreement.triton import compare
    from adarank_kernels.lora import triton_gradients_launch as gradients
    from adarank_kernels.lora import triton_launch as launch
    from adarank_kernels.random.triton import fill

RANK = 16
VARIANTS = 8
Made = Callable[[], tuple[Any, ...]]


def in_pairs(
    context: Context, row: str, kernel: str, cost: Cost, make: Made, ours: Any, plain: Any
) -> list[Row]:
    """Two rows: the kernel, unless it failed, and plain PyTorch; the kernel with its shares."""
    refused = context.failure(kernel)
    if not runs_kernels(context.device):
        refused = "no Triton here"
    elif kernel.startswith("lora") and context.dtype == torch.float32:
        refused = "not used in float32"
    operands = [make() for _ in range(copies(int(cost.bytes), context.device))]
    steps = {
        "plain torch": rotating(plain, operands, before=lambda: choose(context.device, ())),
        "kernel": rotating(ours, operands),
    }
    rows = context.measure(row, steps, refused={"kernel": refused})
    return [context.shares(found, cost) for found in rows]


def lora_kernels(context: Context, row: str) -> list[Row]:
    """Every LoRA kernel in one group's shapes, all of one rank."""
    kind, name = GROUPS[row]
    width, outs = SHAPES[kind].groups()[name]
    M, N, R = len(outs), context.tokens[0] * context.tokens[1], RANK * len(outs)
    offsets, scalings = [RANK * m for m in range(M)], [2.0] * M
    seed = torch.tensor([12345], device=context.device)
    dropout = 0.1

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=context.device).mul_(scale).to(context.dtype)

    def factors() -> tuple[list[Tensor], Tensor, list[Tensor]]:
        return [randn(N, out) for out in outs], randn(N, R), [randn(out, RANK) for out in outs]

    def grad_s_plain(dYs: list[Tensor], _: Tensor, Bs: list[Tensor]) -> list[Tensor]:
        dS = dYs[0].new_empty(N, R)
        for dY, B, first in zip(dYs, Bs, offsets, strict=True):
            dS[:, first : first + RANK].addmm_(dY, B, beta=0.0, alpha=2.0)
        return [dS]

    def grad_b_plain(dYs: list[Tensor], S: Tensor, _: list[Tensor]) -> list[Tensor]:
        return [
            scaled_mm(dY.t(), S[:, first : first + RANK], 2.0)
            for dY, first in zip(dYs, offsets, strict=True)
        ]

    def grad_b(dYs: list[Tensor], S: Tensor, _: list[Tensor]) -> list[Tensor]:
        return gradients.grad_b(dYs, S, offsets, [RANK] * M, scalings, S.dtype)

    def expand_plain(Ys: list[Tensor], S: Tensor, Bs: list[Tensor]) -> None:
        for Y, B, first in zip(Ys, Bs, offsets, strict=True):
            Y.addmm_(S[:, first : first + RANK], B.t(), alpha=2.0)

    def dropped(X: Tensor) -> Tensor:  # as today: by the kernel `drop`, where there is one
        there = runs_kernels(context.device)
        return launch.drop(X, seed, dropout) if there else F.dropout(X, dropout)

    table: list[tuple[str, Cost, Made, Any, Any]] = [
        (
            "shrink",
            product(N, R, width),
            lambda: (randn(N, width), randn(R, width)),
            lambda X, A: launch.shrink(X, A, None, 0.0),
            lambda X, A: torch.mm(X, A.t()),
        ),
        (
            "shrink, dropout",
            product(N, R, width),
            lambda: (randn(N, width), randn(R, width)),
            lambda X, A: launch.shrink(X, A, seed, dropout),
            lambda X, A: torch.mm(F.dropout(X, dropout), A.t()),
        ),
        (
            "expand",
            expand(N, RANK, outs),
            factors,
            lambda Ys, S, Bs: launch.expand(Ys, S, offsets, Bs, scalings),
            expand_plain,
        ),
        (
            "drop",
            drop(N, width),
            lambda: (randn(N, width),),
            lambda X: launch.drop(X, seed, dropout),
            lambda X: F.dropout(X, dropout),
        ),
        (
            "grad_s",
            counts.grad_s(N, RANK, outs),
            factors,
            lambda dYs, S, Bs: gradients.grad_s(dYs, Bs, scalings, offsets, R),
            grad_s_plain,
        ),
        ("grad_b", counts.grad_b(N, RANK, outs), factors, grad_b, grad_b_plain),
        (
            "grad_a, dropout",
            counts.grad_a(N, width, R),
            lambda: (randn(N, R), randn(N, width)),
            lambda dS, X: gradients.grad_a(dS, X, seed, dropout, X.dtype),
            lambda dS, X: torch.mm(dS.t(), dropped(X)),
        ),
    ]
    rows = []
    for title, cost, make, ours, plain in table:
        kernel = "lora_" + title.partition(",")[0]
        rows += in_pairs(context, f"{title}, {row}", kernel, cost, make, ours, plain)
    return rows


def pairs_kernel(context: Context, row: str) -> list[Row]:
    """The l1 distances of a block of outputs of eight variants, pair by pair."""
    tokens = PAIRS[row]

    def compared(f: Tensor) -> Tensor:
        return metrics.l1(f, pairs=True)  # with no kernel chosen: plain torch

    return in_pairs(
        context,
        f"pairs, {VARIANTS} x {tokens} x {op.OUTPUTS}",
        "disagreement_pairs",
        pairs(VARIANTS, tokens, op.OUTPUTS),
        lambda: (torch.randn(VARIANTS, tokens, op.OUTPUTS, device=context.device),),
        lambda f: compare(f, "l1"),
        compared,
    )


def philox_kernel(context: Context, row: str) -> list[Row]:
    """`philox_normal` by the kernel and in torch; torch's own generator for comparison."""
    device, shape = context.device, PHILOX[row]
    size = shape[0] * shape[1]
    key = key_tensor(7, device)
    rows = in_pairs(
        context,
        f"philox, {shape[0]} x {shape[1]}",
        "philox_normal",
        Cost(4 * size),
        lambda: (torch.empty(size // 4, 4, device=device),),
        lambda out: fill(out, key),
        lambda out: fill_in_torch(out, 7),
    )
    own = {"torch.randn": Step(lambda: [torch.randn(shape, device=device)])}
    return rows + context.measure(rows[0]["row"], own)
