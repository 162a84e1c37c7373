"""The Triton form of philox_normal under the interpreter: torch's words, torch's normals."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from adarank_kernels import philox_normal, philox_normal_ref
from adarank_kernels.random import triton
from adarank_kernels.random.philox import _check_kernel, fill_in_torch
from adarank_kernels.random.words import key_tensor, philox_words


@pytest.fixture(autouse=True)
def _no_division_by_zero() -> Iterator[None]:
    """NumPy's integers give 0, a GPU's anything."""
    with np.errstate(divide="raise"):
        yield


SEEDS = [0, 1, 2**32 + 7, 2**63, 2**64 - 1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("total", [1, 7, 4096, 4099, 9000])
def test_words_are_torchs_bit_for_bit(seed: int, total: int) -> None:
    key = key_tensor(seed, torch.device("cpu"))
    buffer = torch.full((total + 8,), -7, dtype=torch.int32)
    triton.fill(buffer[4:-4], key, words=True)
    counters = torch.arange((total + 3) // 4)
    expected = torch.stack(philox_words(key, counters, counters * 0), 1).view(-1)[:total]
    assert torch.equal(buffer[4:-4], expected)
    assert (buffer[:4] == -7).all() and (buffer[-4:] == -7).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_normals(seed: int) -> None:
    ours = philox_normal((9, 331), seed)  # the kernel: the interpreter stands in for the card
    torchs = torch.empty((9 * 331 + 3) // 4, 4)
    fill_in_torch(torchs, seed)
    torchs = torchs.view(-1)[: 9 * 331].view(9, 331)
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-6)
    exact = philox_normal_ref((9, 331), seed, dtype=torch.float64)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype: torch.dtype) -> None:
    rounded = philox_normal((5000,), 3).to(dtype)
    assert torch.equal(philox_normal((5000,), 3, dtype=dtype), rounded)


def test_the_kernel_draws_all_but_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, right = [], triton.fill
    monkeypatch.setattr(triton, "fill", lambda out, key: drawn.append(out.dtype) or right(out, key))
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for dtype in [*dtypes, torch.float64]:
        philox_normal((0,), 3, dtype=dtype)
        assert philox_normal((5,), 3, dtype=dtype).dtype == dtype
    assert drawn == dtypes


def test_self_check_passes_and_sees_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    _check_kernel(torch.device("cpu"))
    right = triton.fill

    def wrong(out: torch.Tensor, key: torch.Tensor, words: bool = False) -> torch.Tensor:
        right(out, key, words).view(-1)[-1] += 1
        return out

    monkeypatch.setattr(triton, "fill", wrong)
    with pytest.raises(ArithmeticError, match="words differ"):
        _check_kernel(torch.device("cpu"))
