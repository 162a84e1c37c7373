"""`pairwise_disagreement` on the CPU against float64 from elsewhere, and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from adarank_kernels import pairwise_disagreement, pairwise_disagreement_ref
from adarank_kernels.disagreement import op as disagreement
from tests.kernels.disagreement_cases import METRICS, exact, head, outputs64, token_values, variants

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(2, 1, 7, 5), (3, 101, 33, 129), (8, 12, 20, 5001), (16, 5, 9, 40)]  # K, N, D, V
INF = float("inf")
both = pytest.mark.parametrize("op", [pairwise_disagreement, pairwise_disagreement_ref])
each_metric = pytest.mark.parametrize("metric", METRICS)


def assert_as_good_as_torch(
    ours: Tensor, torchs: Tensor, right: Tensor, bound: float = 0.0
) -> None:
    """Twice torch's error; of one token, where that is a single draw, `bound` if it is more."""
    error = (ours.double() - right).abs()
    allowed = max(2 * (torchs.double() - right).abs().max().item() + 1e-6, bound)
    assert error.max() <= allowed, f"{error.max():.3g} above {allowed:.3g}"


@each_metric
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.03, 2.0])
def test_with_a_head(metric, dtype, shape, spread) -> None:
    K, N, D, V = shape
    hidden, weight, bias = (
        variants(K, N, D, spread, dtype),
        head(V, D, dtype, 3.0),
        head(V, 1)[:, 0],
    )
    right = exact(hidden, weight, bias.to(dtype), metric=metric)
    ours = pairwise_disagreement(hidden, weight, bias.to(dtype), metric=metric)
    torchs = pairwise_disagreement_ref(hidden, weight, bias.to(dtype), metric=metric)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    largest = np.abs(outputs64(hidden, weight, bias)).max()
    bound = largest * torch.finfo(dtype).eps if N == 1 else 0.0
    if metric == "argmax" and dtype.itemsize == 2:
        bound = 3 / N  # tokens whose two largest outputs are a rounding apart
    assert_as_good_as_torch(ours, torchs, right, bound)
    assert not ours.diagonal().any()
    assert metric == "kl" or torch.equal(ours, ours.t())
    again = pairwise_disagreement(hidden, weight, bias.to(dtype), metric=metric)
    assert torch.equal(ours, again)

    reference = variants(1, N, D, 1.0, dtype, seed=5)[0]
    right = exact(hidden, weight, None, reference=reference, metric=metric)
    ours = pairwise_disagreement(hidden, weight, reference=reference, metric=metric)
    torchs = pairwise_disagreement_ref(hidden, weight, reference=reference, metric=metric)
    assert ours.shape == (K,)
    assert_as_good_as_torch(ours, torchs, right, bound)


@each_metric
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_head(metric, dtype) -> None:
    hidden = variants(5, 9, 77, 0.5, dtype)
    ours = pairwise_disagreement(hidden, metric=metric)
    assert_as_good_as_torch(
        ours, pairwise_disagreement_ref(hidden, metric=metric), exact(hidden, metric=metric)
    )
    one = pairwise_disagreement(hidden[1:2], reference=hidden[0], metric=metric)
    torch.testing.assert_close(one, ours[1:2, 0])


@each_metric
def test_float64_is_exact(metric) -> None:
    hidden, weight = variants(3, 6, 10, 0.3, torch.float64), head(50, 10, torch.float64)
    right = exact(hidden, weight, metric=metric)
    for op in (pairwise_disagreement, pairwise_disagreement_ref):
        torch.testing.assert_close(op(hidden, weight, metric=metric), right, rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize(("metric", "relative"), [("l1", 1e-6), ("tv", 1e-6), ("kl", 1e-4)])
@pytest.mark.parametrize("pairs", [False, True])
def test_small_differences_keep_their_digits(metric, relative, pairs) -> None:
    hidden = variants(3, 20, 64, 1e-6, torch.float32)
    weight, bias = head(700, 64, scale=4.0), 10 * head(700, 1)[:, 0]
    right = exact(hidden, weight, bias, metric=metric)
    if pairs:
        ours = pairwise_disagreement(hidden, weight, bias, metric=metric)
    else:
        right = right[:, 0]
        ours = pairwise_disagreement(hidden, weight, bias, reference=hidden[0], metric=metric)
    torch.testing.assert_close(ours.double(), right, rtol=relative, atol=0)
    assert ours.max() < 1e-5


@pytest.mark.parametrize("metric", ["tv", "kl", "js"])
@pytest.mark.parametrize("move", [-20.0, 20.0, 60.0])
def test_logits_that_all_move_alike_keep_their_digits(metric, move) -> None:
    hidden, weight = variants(3, 20, 64, 0.1), head(700, 64)
    hidden[:, :, 0], weight[:, 0] = 0.0, 64.0
    hidden[1:, :, 0] = move / 64.0  # as language models do: softmax does not see it
    right = exact(hidden, weight, metric=metric)
    torch.testing.assert_close(
        pairwise_disagreement(hidden, weight, metric=metric).double(), right, rtol=2e-5, atol=0
    )


def test_a_large_vocabulary_adds_up_exactly() -> None:
    hidden, weight = variants(2, 8, 32, 0.05), head(49152, 32, scale=3.0)
    right = exact(hidden, weight, metric="tv")
    for ours in (
        pairwise_disagreement(hidden, weight, metric="tv")[1, 0],
        pairwise_disagreement(hidden[1:], weight, metric="tv", reference=hidden[0])[0],
    ):
        torch.testing.assert_close(ours.double(), right[1, 0], rtol=3e-6, atol=0)


def test_bfloat16_sees_what_its_logits_cannot() -> None:
    hidden = variants(3, 30, 64, 0.01, torch.bfloat16)
    weight = head(300, 64, torch.bfloat16)
    bias = torch.full((300,), 16.0, dtype=torch.bfloat16)  # logits are 0.125 apart
    right = exact(hidden, weight)
    ours = pairwise_disagreement(hidden, weight, bias)
    torch.testing.assert_close(ours.double(), right, rtol=2e-3, atol=0)
    torchs = pairwise_disagreement_ref(hidden, weight, bias)
    assert (torchs - right).abs().max() > 10 * (ours - right).abs().max()


@each_metric
def test_mask_reductions_and_values_of_tokens(metric) -> None:
    hidden, weight = variants(4, 50, 12, 0.5), head(60, 12)
    mask = torch.arange(50) % 3 != 0
    spoiled = torch.where(mask[:, None], hidden, torch.nan)
    kept = hidden[:, mask]
    whole = pairwise_disagreement(kept, weight, metric=metric)
    for op in (pairwise_disagreement, pairwise_disagreement_ref):
        torch.testing.assert_close(op(spoiled, weight, mask=mask, metric=metric), whole)
        halves = [
            op(spoiled[:, part], weight, mask=mask[part].int(), reduction="sum", metric=metric)
            for part in (slice(0, 20), slice(20, 50))
        ]
        torch.testing.assert_close(sum(halves) / mask.sum(), whole)
        values = op(
            spoiled, weight, mask=mask, reference=hidden[2], reduction="none", metric=metric
        )
        assert values.shape == (4, 50) and values.dtype == torch.float64
        assert not values[:, ~mask].any()
        f = outputs64(hidden, weight, None)
        for k in range(4):
            right = torch.from_numpy(token_values(f[k], f[2], metric))[mask]
            torch.testing.assert_close(values[k, mask], right, rtol=1e-5, atol=1e-7)


@each_metric
def test_any_chunk_size_gives_the_same(metric, monkeypatch) -> None:
    hidden, weight, bias = variants(3, 37, 16, 0.5), head(300, 16), head(300, 1)[:, 0]
    whole = pairwise_disagreement(hidden, weight, bias, metric=metric)
    monkeypatch.setattr(disagreement, "LOGITS_BYTES", 5 * 3 * 300 * 4)
    monkeypatch.setattr(disagreement, "CACHE_BYTES", 2 * 3 * 300 * 4)
    monkeypatch.setattr(disagreement, "ROWS", 7)
    monkeypatch.setattr(disagreement, "OUTPUTS", 64)
    pieces = pairwise_disagreement(hidden, weight, bias, metric=metric)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-9)


@each_metric
def test_strides_do_not_matter(metric) -> None:
    base = variants(4, 10, 24, 0.5)
    weight = head(33, 24)
    strided = base.permute(2, 1, 0).contiguous().permute(2, 1, 0)[:, ::2, 1::2]
    expanded = base[:1, ::2, 1::2].expand(4, -1, -1)
    columns = weight.t().contiguous().t()[:, 1::2]
    plain = pairwise_disagreement(strided.contiguous(), columns.contiguous(), metric=metric)
    assert plain.max() > 0
    torch.testing.assert_close(pairwise_disagreement(strided, columns, metric=metric), plain)
    assert not pairwise_disagreement(expanded, columns, metric=metric).any()


@both
def test_ties_go_to_the_lowest_index(op) -> None:
    f = torch.tensor([[[1.0, 2.0, 2.0]], [[0.0, 5.0, 1.0]], [[0.0, 5.0, 5.5]]])
    same = torch.tensor([[0.0, 0, 1], [0, 0, 1], [1, 1, 0]])
    assert torch.equal(op(f, metric="argmax"), same)
    head_of_ties = torch.eye(3).repeat_interleave(2, 0)
    assert torch.equal(op(f, head_of_ties, metric="argmax"), same)


@both
@pytest.mark.parametrize("scale", [1e3, 3e4])
def test_large_logits(op, scale) -> None:
    f = scale * torch.tensor([[[1.0, 0.0, 0.5]], [[0.0, 1.0, 0.5]], [[1.0, 0.0, 0.25]]])
    for metric, apart, close in (
        ("tv", 1.0, 0.0),
        ("kl", scale, 0.0),
        ("js", 0.6931472, 0.0),
        ("l1", scale * 2 / 3, scale / 12),
    ):
        for weight in (None, torch.eye(3)):
            d = op(f, weight, metric=metric)
            assert d[0, 1].item() == pytest.approx(apart) and d[1, 0].item() == pytest.approx(apart)
            assert d[0, 2].item() == pytest.approx(close, rel=1e-6, abs=1e-9)


MINUS_INFINITY = {  # of [0, -inf, 0] and [0, 0, -inf] and [0, -inf, 1]
    "l1": ([INF, 1 / 3], [INF, 1 / 3]),
    "tv": ([0.5, 0.2310586], [0.5, 0.2310586]),
    "kl": ([INF, 0.1201145], [INF, 0.1109441]),
    "js": ([0.3465736, 0.0285353], [0.3465736, 0.0285353]),
    "argmax": ([0.0, 1.0], [0.0, 1.0]),
}


@both
@pytest.mark.parametrize("metric", MINUS_INFINITY)
def test_classes_ruled_out_in_the_outputs(op, metric) -> None:
    f = torch.tensor([[[0.0, -INF, 0.0]], [[0.0, 0.0, -INF]], [[0.0, -INF, 1.0]]])
    d = op(f, metric=metric)
    forward, backward = MINUS_INFINITY[metric]
    assert d[0, 1:].tolist() == pytest.approx(forward, abs=1e-6)
    assert d[1:, 0].tolist() == pytest.approx(backward, abs=1e-6)
    assert not d.diagonal().any()
    ours = op(f[1:], metric=metric, reference=f[0])
    assert ours.tolist() == pytest.approx(backward, abs=1e-6)


@both
@each_metric
def test_classes_ruled_out_by_the_head(op, metric) -> None:
    hidden, weight = variants(3, 6, 10, 0.4), head(21, 10)
    bias = head(21, 1)[:, 0].clone()
    bias[[0, 7]] = -INF
    ours = op(hidden, weight, bias, metric=metric)
    allowed = [v for v in range(21) if v not in (0, 7)]
    right = exact(hidden, weight[allowed], bias[allowed], metric=metric)
    if metric == "l1":  # what cancels cannot be told apart
        right = exact(hidden, weight) if op is pairwise_disagreement else right * 19 / 21
    torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-7)


@each_metric
@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("broken", [0, 2])
def test_nan_stays_in_its_variant(metric, with_head, broken) -> None:
    hidden, weight = variants(4, 9, 15, 0.4), head(22, 15) if with_head else None
    right = pairwise_disagreement_ref(hidden, weight, metric=metric)
    spoiled = hidden.clone()
    spoiled[broken, 3, 2] = torch.nan
    ours = pairwise_disagreement(spoiled, weight, metric=metric)
    touched = torch.zeros(4, 4, dtype=torch.bool)
    touched[broken] = touched[:, broken] = True
    assert torch.equal(ours.isnan(), touched)
    torch.testing.assert_close(ours[~touched], right[~touched], rtol=1e-5, atol=1e-7)
    against = pairwise_disagreement(spoiled, weight, reference=hidden[1], metric=metric)
    assert against.isnan().tolist() == [k == broken for k in range(4)]
    against = pairwise_disagreement(hidden, weight, reference=spoiled[broken], metric=metric)
    assert against.isnan().all()


def test_float16_differences_below_its_range() -> None:
    small = torch.full((8, 32), 2.0**-24, dtype=torch.float16) * 3
    zero = torch.zeros(8, 32, dtype=torch.float16)
    weight = head(40, 32, torch.float16)
    hidden = torch.stack([zero, small])
    ours = pairwise_disagreement(hidden, weight, reference=zero)
    torch.testing.assert_close(
        ours.double(), exact(hidden, weight, reference=zero), rtol=2e-3, atol=0
    )


# Bad input


@both
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(4, 6)}, ValueError, r"hidden must be \[K, N, D\], got \[4, 6\]"),
        ({"hidden": torch.ones(1, 4, 6)}, ValueError, "at least two variants.* K = 1"),
        ({"hidden": torch.ones(0, 4, 6)}, ValueError, "at least two variants.* K = 0"),
        ({"hidden": torch.ones(2, 4, 6).long()}, TypeError, "hidden must be floating point"),
        ({"hidden": torch.ones(2, 0, 6), "mask": None}, ValueError, "nothing to compare"),
        ({"weight": torch.ones(5, 7)}, ValueError, r"weight must be \[V, 6\].* got \[5, 7\]"),
        ({"weight": torch.ones(5, 6, device="meta")}, ValueError, "weight is on meta"),
        ({"weight": torch.ones(5, 6).int()}, TypeError, "weight must be floating point"),
        ({"weight": torch.ones(6), "bias": None}, ValueError, r"weight must be \[V, 6\]"),
        ({"weight": torch.ones(5, 6, 1)}, ValueError, r"weight must be .* got \[5, 6, 1\]"),
        ({"weight": torch.ones(0, 6), "bias": None}, ValueError, "outputs must not be empty"),
        ({"hidden": torch.ones(2, 4, 0), "weight": None, "bias": None}, ValueError, "nothing to"),
        ({"bias": torch.ones(5).int()}, TypeError, "bias must be floating point"),
        ({"bias": torch.ones(5, 1)}, ValueError, r"bias must be \[5\]"),
        ({"reference": torch.ones(4, 6).int()}, TypeError, "reference must be floating point"),
        ({"reference": torch.ones(4, 6, device="meta")}, ValueError, "reference is on meta"),
        ({"mask": torch.ones(4, 1)}, ValueError, r"mask must be \[4\]"),
        ({"bias": torch.ones(6)}, ValueError, r"bias must be \[5\], got \[6\]"),
        ({"weight": None}, ValueError, "bias must be None without a weight"),
        ({"mask": torch.ones(5)}, ValueError, r"mask must be \[4\]"),
        ({"mask": torch.zeros(4)}, ValueError, "mask leaves none of 4 tokens"),
        ({"mask": torch.ones(4, device="meta")}, ValueError, "mask is on meta"),
        ({"reference": torch.ones(2, 4, 6)}, ValueError, r"reference must be \[4, 6\]"),
        ({"reference": torch.ones(4, 6).half()}, TypeError, "reference must be torch.float32"),
        ({"metric": "l2"}, ValueError, "metric must be one of l1, .*'l2'"),
        ({"reduction": "max"}, ValueError, "reduction must be .* got 'max'"),
        ({"reduction": "none"}, ValueError, "needs a reference"),
    ],
)
def test_bad_input(op, change, error, message) -> None:
    arguments = {
        "hidden": torch.ones(2, 4, 6),
        "weight": torch.ones(5, 6),
        "bias": torch.ones(5),
        "mask": torch.ones(4),
    }
    with pytest.raises(error, match=message) as raised:
        op(**(arguments | change))
    assert "\n" not in str(raised.value)
