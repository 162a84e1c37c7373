"""The Triton kernels of the disagreement under the interpreter, against float64 and torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adarank_kernels import _disagreement_launch as launch
from adarank_kernels import _triton, pairwise_disagreement, pairwise_disagreement_ref
from adarank_kernels._triton import check_close
from tests.kernels.disagreement_cases import exact, head, variants

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def guarded(tensor: Tensor) -> Tensor:
    """The same numbers inside a buffer of NaN: reading past an edge shows."""
    shape = list(tensor.shape)
    buffer = tensor.new_full([shape[0], shape[1] + 2, *shape[2:]], torch.nan)
    buffer[:, 1:-1] = tensor
    return buffer[:, 1:-1]


@pytest.mark.parametrize("R", [2, 3, 8, 9, 16])
@pytest.mark.parametrize(("tokens", "V"), [(1, 5), (3, 700), (1, 4099)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs(R: int, tokens: int, V: int, dtype: torch.dtype) -> None:
    x = guarded((variants(R, tokens, V, 0.3, torch.float64) / V).to(dtype))
    right = (x.double()[:, None] - x.double()).abs().sum(-1)
    torchs = (x[:, None] - x).abs().float().sum(-1)
    ours = launch.compare(x, "l1")
    check_close(ours, torchs, right)
    assert torch.equal(ours, ours.transpose(0, 1)) and not ours.diagonal().any()
    assert torch.equal(ours, launch.compare(x, "l1"))
    check_close(launch.compare(x, "l1", False), torchs[1:, 0], right[1:, 0])


@pytest.mark.parametrize("name", ["pairs", "fused"])
def test_self_checks_pass(name: str) -> None:
    _triton._checks[f"disagreement_{name}"](torch.device("cpu"))


def test_row_statistics_of_ties_infinities_and_nan() -> None:
    weight = torch.eye(6).repeat(3, 1).half()
    h = torch.tensor([[0.0, 3, 1, 3, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, torch.nan, 0]]).half()
    bias = torch.zeros(18)
    bias[:8] = -torch.inf
    lse, index = launch.row_statistics(h[None], weight, bias)
    lse, index = lse[0], index[0]
    right = (h[:2].double() @ weight.double().t() + bias.double()).logsumexp(-1)
    torch.testing.assert_close(lse[:2].double(), right)
    assert index[:2].tolist() == [9, 8] and lse[2].isnan()


@pytest.mark.parametrize("metric", ["l1", "tv", "kl", "js", "argmax"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "N", "D", "V"), [(2, 60, 16, 33), (3, 21, 40, 130), (16, 7, 33, 65)])
@pytest.mark.parametrize("fused", [False, True])
def test_op_through_the_kernels(metric, dtype, K, N, D, V, fused) -> None:
    hidden, weight = variants(K, N, D, 0.1, dtype), head(V, D, dtype, 3.0)
    bias = head(V, 1, dtype)[:, 0].contiguous()
    _triton.enable("disagreement_fused", fused)
    try:
        ours = pairwise_disagreement(hidden, weight, bias, metric)
        again = pairwise_disagreement(hidden, weight, bias, metric)
        spoiled = hidden.clone()
        spoiled[1, 0] = torch.nan
        broken = pairwise_disagreement(spoiled, weight, bias, metric)
        near = pairwise_disagreement(hidden[1:], weight, bias, metric, reference=hidden[0])
    finally:
        _triton.enable("disagreement_fused", False)
    torchs = pairwise_disagreement_ref(hidden, weight, bias, metric)
    right = exact(hidden, weight, bias, metric)
    if metric == "argmax" and dtype.itemsize == 2:
        assert (ours - right).abs().max() <= 2 / N  # two outputs a rounding apart
    else:
        check_close(ours, torchs, right)
    assert not ours.diagonal().any() and torch.equal(ours, again)
    assert metric == "kl" or torch.equal(ours, ours.t())
    torch.testing.assert_close(near, ours[1:, 0], rtol=1e-5, atol=1e-6)
    touched = torch.zeros(K, K, dtype=torch.bool)
    touched[1] = touched[:, 1] = True
    assert torch.equal(broken.isnan(), touched)
