"""Each Triton kernel by itself, beside plain PyTorch on the same operands, in shares of the card.

Operands are gone through in turn, so that none waits in the card's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adarank_kernels.disagreement import metrics as _disagreement_metrics
from adarank_kernels.disagreement import op as disagreement
from adarank_kernels.random.philox import _fill
from adarank_kernels.random.words import key_tensor
from adarank_kernels.runtime import registry as _triton
from bench.counts import SHAPES, Cost, down, drop, expand, pairs, product
from bench.gpu.checks import choose, runs_kernels
from bench.gpu.context import Context, Row
from bench.gpu.rows import GROUPS, HEADS, PHILOX
from bench.gpu.timing import Step, rotating

if _triton.HAS_TRITON:
    from adarank_kernels.disagreement.triton_launch import compare
    from adarank_kernels.lora import triton_launch as launch
    from adarank_kernels.random import triton as _philox_kernels

RANK = 16
VARIANTS, PAIRED_TOKENS = 8, 512
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
    operands = [make() for _ in range(context.copies(cost))]
    steps = {"plain torch": rotating(plain, operands, before=lambda: choose(context.device, ()))}
    if refused is None:
        steps["kernel"] = rotating(ours, operands)
    rows = context.measure(row, steps)
    for found in rows:
        context.shares(found, cost)
    if refused:
        rows.append({"row": row, "variant": "kernel", "status": refused})
    return rows


def lora_kernels(context: Context, row: str) -> list[Row]:
    """shrink, expand, down, drop and fused in one group's shapes, all of one rank."""
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

    def expand_plain(Ys: list[Tensor], S: Tensor, Bs: list[Tensor]) -> None:
        for Y, B, first in zip(Ys, Bs, offsets, strict=True):
            Y.addmm_(S[:, first : first + RANK], B.t(), alpha=2.0)

    def down_kernel(dYs: list[Tensor], S: Tensor, Bs: list[Tensor]) -> list[Tensor]:
        dS = torch.zeros_like(S)
        return [dS, *launch.down(dYs, S, offsets, Bs, scalings, dS, offsets)]

    def down_plain(dYs: list[Tensor], S: Tensor, Bs: list[Tensor]) -> list[Tensor]:
        dS, dBs = torch.empty_like(S), []
        for dY, B, first in zip(dYs, Bs, offsets, strict=True):
            part = slice(first, first + RANK)
            dS[:, part].addmm_(dY, B, beta=0.0, alpha=2.0)
            dBs.append(torch.mm(S[:, part].t(), dY))
        return [dS, *dBs]

    out = outs[0]
    fused_cost = product(N, out, width) + Cost(2 * RANK * (N + out), 2.0 * N * RANK * out)
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
        ("down", down(N, RANK, outs), factors, down_kernel, down_plain),
        (
            "drop",
            drop(N, width),
            lambda: (randn(N, width),),
            lambda X: launch.drop(X, seed, dropout),
            lambda X: F.dropout(X, dropout),
        ),
        (
            "fused",
            fused_cost,
            lambda: (
                randn(N, width),
                randn(out, width, scale=width**-0.5),
                randn(N, RANK),
                randn(out, RANK),
            ),
            lambda X, W, S, B: launch.fused(X, W, None, S, B, 2.0),
            lambda X, W, S, B: F.linear(X, W).addmm_(S, B.t(), alpha=2.0),
        ),
    ]
    rows = []
    for title, cost, make, ours, plain in table:
        kernel = "lora_" + title.partition(",")[0]
        rows += in_pairs(context, f"{title}, {row}", kernel, cost, make, ours, plain)
    return rows


def disagreement_kernels(context: Context, row: str) -> list[Row]:
    """pairs and the fused head for eight variants: products with a head, compared pair by pair."""
    kind, tokens = HEADS[row]
    shape = SHAPES[kind]
    D, V = shape.width, shape.vocabulary
    half = context.dtype if context.dtype.itemsize == 2 else torch.bfloat16

    def compared(f: Tensor) -> Tensor:
        return _disagreement_metrics.l1(f, pairs=True)  # with no kernel chosen: plain torch

    def head() -> tuple[Tensor, Tensor]:
        rows = torch.randn(VARIANTS, tokens, D, device=context.device).to(half)
        weight = torch.randn(V, D, device=context.device).mul_(D**-0.5).to(half)
        return rows, weight

    block = disagreement.OUTPUTS
    rows = in_pairs(
        context,
        f"pairs, {VARIANTS} x {PAIRED_TOKENS} x {block}",
        "disagreement_pairs",
        pairs(VARIANTS, PAIRED_TOKENS, block),
        lambda: (torch.randn(VARIANTS, PAIRED_TOKENS, block, device=context.device),),
        lambda f: compare(f, "l1"),
        compared,
    )
    return rows + in_pairs(
        context,
        f"fused {row}, {tokens} tokens",
        "disagreement_fused",
        product(VARIANTS * tokens, V, D),
        head,
        lambda h, w: compare(h, "l1", weight=w),
        lambda h, w: compared(F.linear(h, w).float()),
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
        lambda out: _philox_kernels.fill(out, key),
        lambda out: _fill(out, 7),
    )
    own = {"torch.randn": Step(lambda: [torch.randn(shape, device=device)])}
    return rows + context.measure(rows[0]["row"], own)
