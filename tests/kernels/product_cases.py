"""Inputs of the C++ operators, and how their results are judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from adarank_kernels.lora.backends import cpu
from tests.kernels.lora_cases import assert_as_good_as_torch

ROWS = (*range(1, 10), 37, 513)
FEATURES = (5, 33, 80, 81, 576)
RANKS = (1, 3, 8, 24, 64)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),  # factors in float32 beside bfloat16 rows
]
NAMES = [f"{rows}-{factors}".replace("torch.", "") for rows, factors in DTYPES]
SEED, DROPOUT = torch.tensor([2**61 + 77]), 0.3

ops = torch.ops.adarank
needs_operators = pytest.mark.skipif(
    not cpu.usable(torch.zeros(1)), reason="no C++ compiler, or not x86-64 Linux"
)


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """What the operators allocate is NaN until they write it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DTYPES, ids=NAMES)
def dtypes(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.dtype]:
    if not cpu.usable(torch.zeros(1, dtype=request.param[0])):
        pytest.skip("this CPU lacks AVX512-BF16")
    return request.param


def randn(*size: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(*size, generator=generator) * scale


def guarded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers inside a larger matrix of NaN: strided rows, and edges that show."""
    rows, columns = matrix.shape
    buffer = torch.full((rows + 2, columns + 7), float("nan"), dtype=dtype)
    buffer[1:-1, 3:-4] = matrix
    return buffer[1:-1, 3:-4]


def untouched(matrix: Tensor) -> bool:
    """Whether what surrounds a guarded matrix is still NaN, and the matrix is not."""
    buffer = matrix._base
    assert buffer is not None
    return int(buffer.isnan().sum()) == buffer.numel() - matrix.numel()


def layout(ranks: Sequence[int], dtype: torch.dtype) -> tuple[list[int], int]:
    """(first column of each rank, columns)."""
    first, end = [], 0
    for rank in ranks:
        first.append(end)
        end += cpu.padded(rank, dtype)
    return first, end


def low_rank(N: int, ranks: Sequence[int], dtype: torch.dtype) -> Tensor:
    """S or dS: guarded, zero behind an odd rank."""
    first, width = layout(ranks, dtype)
    S = torch.zeros(N, width)
    for start, rank in zip(first, ranks, strict=True):
        S[:, start : start + rank] = randn(N, rank)
    return guarded(S, dtype)


def factors(features: int, ranks: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """lora_A of these ranks; every second one has its ranks side by side."""
    made = [randn(rank, features, scale=features**-0.5).to(dtype) for rank in ranks]
    return [A.t().contiguous().t() if i % 2 else guarded(A, dtype) for i, A in enumerate(made)]


def tall(features: int, rank: int, dtype: torch.dtype, strided: bool) -> Tensor:
    """lora_B."""
    B = randn(features, rank, scale=rank**-0.5).to(dtype)
    return B.t().contiguous().t() if strided else guarded(B, dtype)


def segment(rank: int, N: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(S, first column of one rank): NaN in the columns of others."""
    padded = cpu.padded(rank, dtype)
    S = torch.full((N, padded + 8), float("nan"), dtype=dtype)
    S[:, 2 : 2 + padded] = 0
    S[:, 2 : 2 + rank] = randn(N, rank)
    return S, 2


def close(ours: Any, torchs: Any, exact: Any) -> None:
    def named(tensors: Any) -> dict[str, Tensor]:
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        return {f"{i}": t for i, t in enumerate(tensors)}

    assert_as_good_as_torch(named(ours), named(torchs), named(exact))


# Values against float64. Scalings of rows that are few are powers of two: scaling F is rounded to
# the element type, which one number alone may show.
