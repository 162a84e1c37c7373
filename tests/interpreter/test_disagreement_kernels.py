"""The Triton kernels of the disagreement under the interpreter, against float64 and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from adarank_kernels import pairwise_disagreement, pairwise_disagreement_ref
from adarank_kernels.disagreement import triton
from adarank_kernels.runtime import registry
from adarank_kernels.runtime.registry import check_close
from tests.kernels.disagreement_cases import METRICS, exact, head, token_values, variants

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


def guarded(tensor: Tensor) -> Tensor:
    """The same numbers inside a buffer of NaN: reading past an edge shows."""
    shape = list(tensor.shape)
    buffer = tensor.new_full([shape[0], shape[1] + 2, *shape[2:]], torch.nan)
    buffer[:, 1:-1] = tensor
    return buffer[:, 1:-1]


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes by operations; `test_self_check_passes` has the offered tiles."""
    monkeypatch.setitem(triton.PAIRS, "M", 128)


@pytest.mark.parametrize("R", [2, 3, 8, 9, 16])
@pytest.mark.parametrize(("tokens", "V"), [(1, 5), (3, 700), (1, 4099)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs(R: int, tokens: int, V: int, dtype: torch.dtype) -> None:
    x = guarded((variants(R, tokens, V, 0.3, torch.float64) / V).to(dtype))
    right = (x.double()[:, None] - x.double()).abs().sum(-1)
    torchs = (x[:, None] - x).abs().float().sum(-1)
    ours = triton.compare(x, "l1")
    check_close(ours, torchs, right)
    assert torch.equal(ours, ours.transpose(0, 1)) and not ours.diagonal().any()
    assert torch.equal(ours, triton.compare(x, "l1"))
    check_close(triton.compare(x, "l1", False), torchs[1:, 0], right[1:, 0])


@pytest.mark.parametrize("metric", METRICS[1:4])
@pytest.mark.parametrize(("R", "tokens", "V"), [(2, 5, 5), (3, 3, 700), (9, 2, 33), (16, 1, 4099)])
def test_pairs_of_distributions(metric: str, R: int, tokens: int, V: int, large_tiles) -> None:
    f = variants(R, tokens, V, 2.0)
    x = guarded(f)

    def values(f: Tensor) -> Tensor:
        rows = f.double().numpy()
        return torch.tensor(np.array([[token_values(a, b, metric) for b in rows] for a in rows]))

    right = values(f)
    for centre in (f[0], torch.zeros_like(f[0])):  # any base will do
        options = {"shift": -centre, "base": centre.log_softmax(-1)}
        ours = triton.compare(x, metric, **options)
        torch.testing.assert_close(ours, right, rtol=3e-6, atol=3e-7)
        assert torch.equal(ours, triton.compare(x, metric, **options))
        near = triton.compare(x, metric, False, **options)
        torch.testing.assert_close(near, right[1:, 0], rtol=3e-6, atol=3e-7)
        assert metric == "kl" or torch.equal(ours, ours.transpose(0, 1))
        assert not ours.diagonal().any()


def test_self_check_passes() -> None:
    registry._checks["disagreement_pairs"](torch.device("cpu"))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("K", "N", "D", "V"), [(2, 60, 17, 33), (3, 21, 40, 131), (8, 9, 24, 70), (16, 7, 33, 65)]
)
def test_op_through_the_kernels(metric, dtype, K, N, D, V, large_tiles) -> None:
    hidden, weight = variants(K, N, D, 0.1, dtype), head(V, D, dtype, 3.0)
    bias = head(V, 1, dtype)[:, 0].contiguous()
    ours = pairwise_disagreement(hidden, weight, bias, metric)
    again = pairwise_disagreement(hidden, weight, bias, metric)
    spoiled = hidden.clone()
    spoiled[1, 0] = torch.nan
    broken = pairwise_disagreement(spoiled, weight, bias, metric)
    near = pairwise_disagreement(hidden[1:], weight, bias, metric, reference=hidden[0])
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


@pytest.mark.parametrize("metric", METRICS)
def test_mask(metric, large_tiles) -> None:
    hidden, weight = variants(3, 13, 20, 0.4), head(35, 20)
    mask = torch.arange(13) % 3 != 0
    spoiled = torch.where(mask[:, None], hidden, torch.nan)
    right = exact(hidden[:, mask], weight, metric=metric)
    ours = pairwise_disagreement(spoiled, weight, metric=metric, mask=mask)
    torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-6)
    values = pairwise_disagreement(
        spoiled, weight, metric=metric, mask=mask, reference=hidden[1], reduction="none"
    )
    assert values.shape == (3, 13) and not values[:, ~mask].any()
    torch.testing.assert_close(values[:, mask].mean(-1), right[:, 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("metric", "relative"), [("tv", 1e-6), ("kl", 1e-5), ("js", 1e-4)])
@pytest.mark.parametrize("with_head", [False, True])
def test_small_differences_keep_their_digits(metric, relative, with_head, large_tiles) -> None:
    """js: scipy's float64 has five digits of 1e-11."""
    hidden = variants(3, 5, 64, 1e-5)
    weight, bias = (
        (head(700, 64, scale=4.0), 10 * head(700, 1)[:, 0]) if with_head else (None, None)
    )
    right = exact(hidden, weight, bias, metric)
    ours = pairwise_disagreement(hidden, weight, bias, metric)
    torch.testing.assert_close(ours.double(), right, rtol=relative, atol=0)
    near = pairwise_disagreement(hidden, weight, bias, metric, reference=hidden[0])
    torch.testing.assert_close(near.double(), right[:, 0], rtol=relative, atol=0)
    assert ours.max() < 1e-4


@pytest.mark.parametrize("metric", METRICS[1:4])
@pytest.mark.parametrize("scale", [30.0, 1e3, 3e4])
@pytest.mark.parametrize("with_head", [False, True])
def test_large_logits(metric, scale, with_head, large_tiles) -> None:
    f = scale * torch.cat([variants(4, 3, 9, 0.01), variants(2, 3, 9, 3.0)])
    weight = torch.eye(9) if with_head else None
    right = exact(f, None, None, metric)
    ours = pairwise_disagreement(f, weight, None, metric)
    torchs = pairwise_disagreement_ref(f, weight, None, metric)
    allowed = 2 * (torchs - right).abs() + 3e-6 * right + 1e-6
    assert ((ours - right).abs() <= allowed).all()


RULED_OUT = torch.tensor([[0, -INF, 0, 1], [0, 0, -INF, 1], [0, -INF, 1, 1], [200, -INF, 0, -INF]])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("first", [0, 1, 3])
def test_classes_ruled_out_in_the_outputs(metric, first, large_tiles) -> None:
    f = RULED_OUT.roll(-first, 0)[:, None]
    right = pairwise_disagreement_ref(f.double(), metric=metric)
    ours = pairwise_disagreement(f, metric=metric)
    # the rounding of log-probabilities that are 200 from the centre's
    torch.testing.assert_close(ours.double(), right, rtol=2e-5, atol=1e-7)
    near = pairwise_disagreement(f, metric=metric, reference=f[1])
    torch.testing.assert_close(near.double(), right[:, 1], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS[1:])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_classes_ruled_out_by_the_head(metric, spread, large_tiles) -> None:
    hidden, weight, bias = variants(3, 6, 20, spread), head(21, 20), head(21, 1)[:, 0].clone()
    bias[[0, 7]] = -INF
    allowed = [v for v in range(21) if v not in (0, 7)]
    right = exact(hidden, weight[allowed], bias[allowed], metric)
    ours = pairwise_disagreement(hidden, weight, bias, metric)
    torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-6)
