"""The C++ operators one by one: values and bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adarank_kernels.lora.backends import cpu
from adarank_kernels.lora.dropout import keep_mask
from tests.kernels.product_cases import (
    DROPOUT,
    FEATURES,
    RANKS,
    ROWS,
    SEED,
    close,
    dtypes,
    factors,
    guarded,
    layout,
    low_rank,
    needs_operators,
    ops,
    poisoned_outputs,
    randn,
    segment,
    tall,
    untouched,
)

__all__ = ["dtypes", "poisoned_outputs"]  # fixtures
pytestmark = needs_operators


@pytest.mark.parametrize("features", FEATURES)
def test_drop(dtypes: tuple[torch.dtype, torch.dtype], features: int) -> None:
    for N in (0, *ROWS):
        X = guarded(randn(N, features), dtypes[0])
        for p in (0.0, 0.1, 0.5, 1.0):
            expected = X * keep_mask(SEED, N, features, p)
            assert torch.equal(ops.drop(X, SEED, p), expected)
            assert torch.equal(ops.drop(X.t().contiguous().t(), SEED, p), expected)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("seed", [None, SEED])
def test_shrink(
    dtypes: tuple[torch.dtype, torch.dtype], features: int, seed: Tensor | None
) -> None:
    dtype, low = dtypes
    As, (first, width) = factors(features, RANKS, low), layout(RANKS, dtype)
    for N in ROWS:
        X = guarded(randn(N, features), dtype)
        S = ops.shrink(X, As, first, width, seed, DROPOUT)
        kept = X if seed is None else X * keep_mask(seed, N, features, DROPOUT)
        parts = [S[:, f : f + rank] for f, rank in zip(first, RANKS, strict=True)]
        torchs = [kept @ A.to(dtype).t() for A in As]
        close(parts, torchs, [kept.double() @ A.double().t() for A in As])
        between = S.clone()
        for f, rank in zip(first, RANKS, strict=True):
            between[:, f : f + rank] = 0
        assert not between.any()  # zeros behind odd ranks
        columns_first = X.t().contiguous().t()
        assert torch.equal(ops.shrink(columns_first, As, first, width, seed, DROPOUT), S)
        for A, part in zip(As, parts, strict=True):  # the same bits alone
            alone = ops.shrink(X, [A], [0], cpu.padded(len(A), dtype), seed, DROPOUT)
            assert torch.equal(alone[:, : len(A)], part)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rank", RANKS)
def test_expand(dtypes: tuple[torch.dtype, torch.dtype], features: int, rank: int) -> None:
    dtype, low = dtypes
    bias = randn(features).to(dtype)
    for N in ROWS:
        Y, (S, first) = guarded(randn(N, features), dtype), segment(rank, N, dtype)
        part = S[:, first : first + rank]
        for strided in (False, True):
            B = tall(features, rank, low, strided)
            for scaling, b in ((1.0, None), (0.5, bias)):
                y = guarded(Y, dtype)
                version = y._version
                assert ops.expand_(y, S, B, first, scaling, b) is None
                assert y._version == version + 1 and untouched(y)
                more = torch.zeros(()) if b is None else b
                exact = Y.double() + scaling * (part.double() @ B.double().t()) + more.double()
                torchs = Y + scaling * (part @ B.to(dtype).t()) + more.to(dtype)
                close(y, torchs, exact)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rank", RANKS)
def test_grad_s(dtypes: tuple[torch.dtype, torch.dtype], features: int, rank: int) -> None:
    dtype, low = dtypes
    padded = cpu.padded(rank, dtype)
    for N in ROWS:
        dY = guarded(randn(N, features, scale=features**-0.5), dtype)
        for strided in (False, True):
            B = tall(features, rank, low, strided)
            dS = torch.full((N, padded + 8), float("nan"), dtype=dtype)
            ops.grad_s_(dS, dY, B, 2, 2.0)
            assert dS._version == 1
            assert dS[:, :2].isnan().all() and dS[:, 2 + padded :].isnan().all()
            assert not dS[:, 2 + rank : 2 + padded].any()
            exact = 2 * (dY.double() @ B.double())
            close(dS[:, 2 : 2 + rank], 2 * (dY @ B.to(dtype)), exact)
            again = torch.empty_like(dS)
            ops.grad_s_(again, dY.t().contiguous().t(), B, 2, 2.0)
            assert torch.equal(again[:, 2 : 2 + rank], dS[:, 2 : 2 + rank])


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rank", RANKS)
def test_grad_b(dtypes: tuple[torch.dtype, torch.dtype], features: int, rank: int) -> None:
    dtype, low = dtypes
    for N in (0, *ROWS):
        dY = guarded(randn(N, features, scale=max(N, 1) ** -0.5), dtype)
        S, first = segment(rank, N, dtype)
        part = S[:, first : first + rank]
        dB = ops.grad_b(dY, S, first, rank, 1.7, low)
        torchs = (1.7 * (dY.t() @ part)).to(low)
        close(dB, torchs, 1.7 * (dY.double().t() @ part.double()))
        again = ops.grad_b(dY.t().contiguous().t(), S, first, rank, 1.7, low)
        assert torch.equal(again, dB)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("seed", [None, SEED])
def test_grad_a(
    dtypes: tuple[torch.dtype, torch.dtype], features: int, seed: Tensor | None
) -> None:
    dtype, low = dtypes
    first, _ = layout(RANKS, dtype)
    for N in (0, *ROWS):
        X, dS = guarded(randn(N, features), dtype), low_rank(N, RANKS, dtype)
        dAs = ops.grad_a(dS, X, first, RANKS, low, seed, DROPOUT)
        kept = X if seed is None else X * keep_mask(seed, N, features, DROPOUT)
        parts = [dS[:, f : f + rank] for f, rank in zip(first, RANKS, strict=True)]
        torchs = [(part.t() @ kept).to(low) for part in parts]
        close(dAs, torchs, [part.double().t() @ kept.double() for part in parts])
        again = ops.grad_a(dS, X.t().contiguous().t(), first, RANKS, low, seed, DROPOUT)
        assert all(torch.equal(a, b) for a, b in zip(again, dAs, strict=True))
        for f, rank, dA in zip(first, RANKS, dAs, strict=True):  # the same bits alone
            (alone,) = ops.grad_a(dS, X, [f], [rank], low, seed, DROPOUT)
            assert torch.equal(alone, dA)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("ranks", [(1,), (8,), RANKS])
def test_grad_x(
    dtypes: tuple[torch.dtype, torch.dtype],
    features: int,
    seed: Tensor | None,
    ranks: tuple[int, ...],
) -> None:
    dtype, low = dtypes
    As, (first, _) = factors(features, ranks, low), layout(ranks, dtype)
    for N in ROWS:
        dX, dS = guarded(randn(N, features), dtype), low_rank(N, ranks, dtype)
        ours = guarded(dX, dtype)
        version = ours._version
        ops.grad_x_(ours, dS, As, first, seed, DROPOUT)
        assert ours._version == version + 1 and untouched(ours)
        keep = torch.ones(()) if seed is None else keep_mask(seed, N, features, DROPOUT)
        used = [list(range(f, f + rank)) for f, rank in zip(first, ranks, strict=True)]
        S = dS[:, sum(used, [])]
        exact = dX.double() + keep * (S.double() @ torch.cat([A.double() for A in As]))
        torchs = dX + keep.to(dtype) * (S @ torch.cat([A.to(dtype) for A in As]))
        close(ours, torchs, exact)


def test_scalings_that_are_rounded(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, low = dtypes
    S, first = segment(24, 513, dtype)
    part, B, Y = S[:, 2:26], tall(81, 24, low, False), randn(513, 81).to(dtype)
    y = Y.clone()
    ops.expand_(y, S, B, first, 1.7, None)
    exact = Y.double() + 1.7 * (part.double() @ B.double().t())
    close(y, Y + 1.7 * (part @ B.to(dtype).t()), exact)
    dS = torch.zeros(513, 32, dtype=dtype)
    ops.grad_s_(dS, Y, B, 2, 1.7)
    close(dS[:, 2:26], 1.7 * (Y @ B.to(dtype)), 1.7 * (Y.double() @ B.double()))


def test_zero_rows(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, low = dtypes
    none, S = torch.empty(0, 80, dtype=dtype), torch.empty(0, 8, dtype=dtype)
    A, B = factors(80, [8], low)[0], tall(80, 8, low, False)
    for seed in (None, SEED):
        assert ops.shrink(none, [A], [0], 8, seed, 0.3).shape == (0, 8)
        ops.grad_x_(none, S, [A], [0], seed, 0.3)
        (dA,) = ops.grad_a(S, none, [0], [8], low, seed, 0.3)
        assert torch.equal(dA, torch.zeros(8, 80, dtype=low))
    ops.expand_(none, S, B, 0, 1.0, None)
    ops.grad_s_(S, none, B, 0, 1.0)
    assert torch.equal(ops.grad_b(none, S, 0, 8, 1.0, low), torch.zeros(80, 8, dtype=low))


def test_zero_features_and_no_ranks(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, low = dtypes
    for N in (3, 37):
        X, empty = randn(N, 80).to(dtype), torch.empty(N, 0, dtype=dtype)
        assert ops.shrink(X, [], [], 0, None, 0.0).shape == (N, 0)
        assert not ops.shrink(X, [], [], 6, None, 0.0).any()
        assert not ops.shrink(empty, [torch.empty(4, 0, dtype=low)], [0], 4, None, 0.0).any()
        assert ops.grad_a(empty, X, [], [], low, None, 0.0) == []
        assert ops.grad_b(X, empty, 0, 0, 1.0, low).shape == (80, 0)
        ours = X.clone()
        ops.expand_(ours, empty, torch.empty(80, 0, dtype=low), 0, 1.0, None)
        ops.grad_x_(ours, empty, [], [], None, 0.0)
        assert torch.equal(ours, X)


def each(dtype: torch.dtype, low: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Every operator on large matrices, by name."""
    N, features, ranks = 513, 576, (3, 24)
    first, width = layout(ranks, dtype)
    X, dS = randn(N, features).to(dtype), low_rank(N, ranks, dtype)
    As, B = factors(features, ranks, low), tall(features, 24, low, False)

    def changed(op: Any, tensor: Tensor, *arguments: Any) -> Tensor:
        copy = tensor.clone()
        op(copy, *arguments)
        return copy

    zeros = torch.zeros(N, width, dtype=dtype)
    return {
        "drop": lambda: ops.drop(X, SEED, 0.3),
        "shrink": lambda: ops.shrink(X, As, first, width, SEED, 0.3),
        "expand_": lambda: changed(ops.expand_, X, dS, B, first[1], 0.7, None),
        "grad_s_": lambda: changed(ops.grad_s_, zeros, X, B, first[1], 0.7),
        "grad_b": lambda: ops.grad_b(X, dS, first[1], 24, 0.7, low),
        "grad_a": lambda: ops.grad_a(dS, X, first, ranks, low, SEED, 0.3),
        "grad_x_": lambda: changed(ops.grad_x_, X, dS, As, first, SEED, 0.3),
    }


def test_bits_do_not_depend_on_the_threads(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    threads = torch.get_num_threads()
    try:
        for name, run in each(*dtypes).items():
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                result = run()
                found.append(result if isinstance(result, list) else [result])
            for others in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True)), name
    finally:
        torch.set_num_threads(threads)


# Schemas
