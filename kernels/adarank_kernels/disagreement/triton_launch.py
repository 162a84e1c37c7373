"""Launchers and numerical self-checks of the kernels in `_disagreement_kernels.py`."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from adarank_kernels.disagreement import triton_kernels as kernels
from adarank_kernels.runtime.registry import cdiv, check_close, register

METRICS = ("l1", "tv", "kl", "js")


MAX_ROWS = 16  # variants, the reference included


# One known-good configuration each; M rows are M / K tokens.
PAIRS = {"M": 16, "BLOCK_V": 512, "BLOCK_D": 16, "num_warps": 8, "num_stages": 2}


PAIRS_HEAD = {"M": 128, "BLOCK_V": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 2}


ROWS = PAIRS


ROWS_HEAD = {"M": 128, "BLOCK_V": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}


SPLIT = 4096  # outputs a program adds up: the same on every device, so that sums are too


def padded(R: int) -> int:
    """Rows of a token's group: a power of two, 8 at least."""
    return 8 if R <= 8 else 16


def pairs_options(metric: str, head: bool) -> dict[str, int]:
    """Half as wide a tile where twice as many are in registers."""
    options = PAIRS_HEAD if head else PAIRS
    narrow = metric in ("kl", "js") or (metric == "tv" and not head)
    return options | {"BLOCK_V": options["BLOCK_V"] // 2} if narrow else options


def compare(
    x: Tensor,
    metric: str,
    every: bool = True,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Distances of up to 16 rows, l1 summed over outputs; float64, `every` pair [R, R, tokens].

    Args:
        x: outputs [R, tokens, V] but for `bias`, or rows [R, tokens, D] that `weight` multiplies;
            last stride 1.
        metric: "l1", "tv", "kl" (row i, column j) or "js".
        every: False: row 0 only, [R - 1, tokens]; kl as KL(p_k || p_0).
        weight: head [V, D].
        bias: [V] with a head, else [tokens, V].
        base: log-probabilities [tokens, V], finite, that x + bias is relative to: best such that
            it is small. For tv, kl and js without a head.
    """
    weight, bias, base = (t if t is None else t.contiguous() for t in (weight, bias, base))
    lse = x if metric == "l1" else row_statistics(x, weight, bias, base)[0]
    (R, tokens, D), K = x.shape, padded(len(x))
    V = D if weight is None else len(weight)
    options = pairs_options(metric, weight is not None)
    blocks, splits = cdiv(tokens * K, options["M"]), cdiv(V, SPLIT)
    out = torch.empty(splits, blocks * options["M"], K, device=x.device)
    with _device(x):
        kernels.pairs_kernel[(blocks, splits)](
            x, *(x if t is None else t for t in (weight, bias, base)), lse, out,
            R, tokens, D, V, x.stride(0), x.stride(1), SPLIT, K=K, METRIC=metric, ALL=every,
            HEAD=weight is not None, HAS_BIAS=bias is not None, PRECISION="tf32", **options,
        )  # fmt: skip
    sums = out.double().sum(0)[: tokens * K].view(tokens, K, K)
    found = _unrolled(sums, R, metric) if every else sums[:, 1:R, 1].t().contiguous()
    return found / 2 if metric == "tv" else found


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _unrolled(sums: Tensor, R: int, metric: str) -> Tensor:
    """[tokens, K, K] of rows and shifts -> [R, R, tokens]."""
    i, shift = _pairs(R, sums.shape[-1], metric == "kl", sums.device)
    return sums[:, i, shift].permute(1, 2, 0).contiguous()


@lru_cache(maxsize=256)
def _pairs(R: int, K: int, ordered: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where `pairs_kernel` puts the sum of rows i and j: [R, R] of rows and of shifts."""
    i = torch.arange(R)[:, None]
    j = i.t()
    if not ordered:  # one sum for (i, j) and (j, i): of that row from which j is K / 2 at most
        low, high = torch.minimum(i, j), torch.maximum(i, j)
        near = high - low <= K // 2
        i, j = torch.where(near, low, high), torch.where(near, high, low)
    return i.to(device), ((j - i) % K).to(device)


def row_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, base: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of x as in `compare`: logsumexp and argmax [R, tokens], lowest on ties.

    Without a head of base + x: logsumexp and e to it less 1. NaN logits: a NaN logsumexp.
    """
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    (R, tokens, D), head = x.shape, weight is not None
    V = D if weight is None else len(weight)
    options, splits = ROWS_HEAD if head else ROWS, cdiv(V, SPLIT)
    lse, largest, second = (
        torch.empty(splits, R, tokens, dtype=dtype, device=x.device)
        for dtype in (torch.float32, torch.float32, torch.int32 if head else torch.float32)
    )
    with _device(x):
        kernels.rows_kernel[(cdiv(R * tokens, options["M"]), splits)](
            x, *(x if t is None else t for t in (weight, bias, base)), lse, largest, second,
            R, tokens, D, V, x.stride(0), x.stride(1), SPLIT,
            HEAD=head, HAS_BIAS=bias is not None, PRECISION="tf32", **options,
        )  # fmt: skip
    lse = lse.logsumexp(0)
    if head:
        return lse, second.gather(0, largest.argmax(0, keepdim=True))[0].long()
    moved = second.sum(0)  # e^lse - 1, to the last digit also where lse is near 0
    return torch.where(moved.abs() < 0.5, moved.log1p(), lse), moved


# What a kernel must do right on a device before it is used there
def _numbers(device: torch.device, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(*size, generator=generator).to(device)


def _exact(f: Tensor, metric: str) -> Tensor:
    """What `compare` should give for [R, tokens, V]."""
    if metric == "l1":
        return (f[:, None] - f).abs().double().sum(-1)
    log_p = f.log_softmax(-1)
    p, log_m = log_p.exp(), torch.logaddexp(log_p[:, None], log_p) - math.log(2)
    if metric == "tv":
        return (p[:, None] - p).abs().double().sum(-1) / 2
    if metric == "kl":
        return (p[:, None] * (log_p[:, None] - log_p)).double().sum(-1)
    own = (p[:, None] * (log_p[:, None] - log_m)).double().sum(-1)
    return (own + own.transpose(0, 1)) / 2


def _check_pairs(device: torch.device) -> None:
    for R, tokens, V in ((3, 5, 777), (16, 1, 4100)):
        outputs = _numbers(device, R, tokens, V) / 8
        base = outputs[0].log_softmax(-1)
        for metric in METRICS:
            x = outputs / V if metric == "l1" else outputs
            right, torchs = _exact(x.double(), metric), _exact(x, metric)
            options: dict[str, Any] = {} if metric == "l1" else {"bias": -x[0], "base": base}
            check_close(compare(x, metric, **options), torchs, right)
            check_close(compare(x, metric, False, **options), torchs[1:, 0], right[1:, 0])


def _check_fused(device: torch.device) -> None:
    for R, D, dtype in ((3, 40, torch.bfloat16), (16, 64, torch.float16)):
        rows = _numbers(device, R, 11, D).to(dtype)
        weight, bias = _numbers(device, 300, D).div(D).to(dtype), _numbers(device, 300).to(dtype)
        f, exact = rows @ weight.t(), rows.double() @ weight.double().t()
        check_close(compare(rows, "l1", weight=weight), _exact(f, "l1"), _exact(exact, "l1"))
        f, exact = f + bias, exact + bias.double()
        for metric in METRICS[1:]:
            ours = compare(rows, metric, weight=weight, bias=bias)
            check_close(ours, _exact(f, metric), _exact(exact, metric))
        lse, index = row_statistics(rows, weight, bias)
        check_close(lse, f.float().logsumexp(-1), exact.logsumexp(-1))
        chosen = exact.gather(2, index[..., None])[..., 0]
        check_close(chosen, exact.amax(-1), exact.amax(-1))
    ties = torch.ones(1, 2, 64, dtype=torch.bfloat16, device=device)
    if row_statistics(ties, ties[0].repeat(100, 1))[1].any():
        raise ArithmeticError("a tie does not go to the lowest index")


register("disagreement_pairs", _check_pairs)


register("disagreement_fused", _check_fused, opt_in=True)
