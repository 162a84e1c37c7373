"""The CPU library of products with few ranks: values, edges, threads, dropout."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adarank_kernels.lora import skinny
from adarank_kernels.lora.dropout import keep_mask, threshold
from adarank_kernels.lora.skinny import Factors, drop, narrow, outer, usable, wide
from adarank_kernels.runtime import native

DTYPES = [torch.float32, torch.bfloat16]
RANKS = (3, 1, 8, 24)


def test_it_is_there() -> None:
    """Where CI runs, at least: else the tests below would try nothing."""
    assert shutil.which("cc") and usable(torch.randn(16, 5))
    has_instruction = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    assert usable(torch.randn(16, 5).bfloat16()) == has_instruction
    assert not usable(torch.randn(15, 5)) and not usable(torch.randn(16, 5).double())
    assert not usable(torch.randn(16, 0))


def test_torch_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert native.build("nothing", "int one(void) { return 1; }") is None


def skip_without(dtype: torch.dtype) -> None:
    if not usable(torch.zeros(16, 2, dtype=dtype)):
        pytest.skip(f"this CPU has no instruction for {dtype}")


def make(
    rows: int, features: int, dtype: torch.dtype, of_factors: torch.dtype, ranks_last: bool
) -> tuple[Tensor, Tensor, list[Tensor], list[int]]:
    """X, S, factors [rank, features] and their starts; numbers exact in bfloat16."""
    generator = torch.Generator().manual_seed(rows * 1000 + features)
    starts = [0, *itertools.accumulate(rank + rank % 2 for rank in RANKS)]

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).bfloat16()

    S = randn(rows, starts[-1]).to(dtype)
    for rank, start in zip(RANKS, starts, strict=False):
        if rank % 2:
            S[:, start + rank] = 0
    X = randn(rows, features + 3).to(dtype)[:, :features]
    factors = [randn(rank, features).to(of_factors) for rank in RANKS]
    if ranks_last:
        factors = [f.t().contiguous().t() for f in factors]
    return X, S, factors, starts[:-1]


def as_good(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    allowed = 2 * (torchs.double() - exact).abs().max() + 1e-6 * exact.abs().max() + 1e-6
    assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_factors", DTYPES)
@pytest.mark.parametrize("ranks_last", [False, True])
@pytest.mark.parametrize(
    "rows, features", [(1, 1), (2, 33), (5, 16), (37, 71), (515, 96), (3, 700)]
)
def test_values(
    dtype: torch.dtype, of_factors: torch.dtype, ranks_last: bool, rows: int, features: int
) -> None:
    skip_without(dtype)
    if dtype == torch.float32 and of_factors != dtype:
        of_factors = dtype
    X, S, factors, starts = make(rows, features, dtype, of_factors, ranks_last)
    side_by_side = Factors(factors, [0] * len(factors), starts)
    bias = torch.arange(features).to(dtype)
    padded = torch.zeros(S.shape[1], features, dtype=torch.float64)
    for f, start in zip(factors, starts, strict=True):
        padded[start : start + len(f)] = f.double()
    low = padded.to(dtype)

    found = torch.full_like(S, torch.nan)
    narrow(X, found, side_by_side, 0.5)
    as_good(found, X @ (low * 0.5).t(), X.double() @ padded.t() * 0.5)

    wider = torch.full((rows, features + 3), torch.nan).to(dtype)
    wider[:, :features] = X
    wide(wider[:, :features], S, side_by_side, 0.5, bias)
    exact = X.double() + S.double() @ padded * 0.5 + bias.double()
    as_good(wider[:, :features], torch.addmm(X + bias, S, low * 0.5), exact)
    assert wider[:, features:].isnan().all()  # what is beside it stays

    gradients = [torch.full_like(f, torch.nan) for f in factors]
    outer(X, S, Factors(gradients, [0] * len(factors), starts), 0.3)
    exact, torchs = 0.3 * S.double().t() @ X.double(), (S.t() @ X) * 0.3
    for g, start in zip(gradients, starts, strict=True):
        some = slice(start, start + len(g))
        as_good(g, torchs[some], exact[some])
        assert g.dtype == of_factors


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_thread_or_two(dtype: torch.dtype) -> None:
    skip_without(dtype)
    X, S, factors, starts = make(300, 500, dtype, dtype, False)
    side_by_side, seed = Factors(factors, [0] * len(factors), starts), torch.tensor([7])

    def results() -> list[Tensor]:
        narrowed, widened, gradients = S.clone(), X.clone(), [f.clone() for f in factors]
        narrow(X, narrowed, side_by_side)
        wide(widened, S, side_by_side)
        outer(X, S, Factors(gradients, [0] * len(factors), starts))
        return [
            narrowed,
            widened,
            *gradients,
            drop(X, seed, 9000, torch.empty(X.shape, dtype=dtype)),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(2)
        assert all(map(torch.equal, results(), alone))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_stays_in_its_row_and_module(dtype: torch.dtype) -> None:
    skip_without(dtype)
    X, S, factors, starts = make(40, 64, dtype, dtype, False)
    X[7, 3] = torch.inf
    factors[2][:, 5] = torch.nan
    narrow(X, S, Factors(factors, [0] * len(factors), starts))
    assert S[:, 3].eq(0).all() and S[:, 5].eq(0).all()  # beside odd ranks
    assert S[:, 6:14].isnan().all() and S[:, :3][torch.arange(40) != 7].isfinite().all()
    assert S[7, :3].isinf().all() and S[:7, 14:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, features", [(1, 1), (5, 130), (70, 257)])
def test_dropout_draws_the_same_mask(dtype: torch.dtype, rows: int, features: int) -> None:
    skip_without(dtype)
    X = torch.randn(rows, features).to(dtype)
    total, seed = torch.randn(rows, features).to(dtype), torch.tensor([-(2**63) + 12345])
    keep = keep_mask(seed, rows, features, 0.4)
    assert torch.equal(drop(X, seed, threshold(0.4), torch.empty_like(X)), X * keep)
    assert torch.equal(drop(X, seed, threshold(0.4), total.clone(), add=True), total + X * keep)
    assert not drop(X, seed, threshold(1.0), torch.empty_like(X)).any()
    assert skinny.drop(X, seed, 0, torch.empty_like(X)).equal(X)
