"""The pieces of `pairwise_disagreement`, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adarank_kernels.disagreement import metrics
from adarank_kernels.disagreement import op as disagreement
from tests.kernels.disagreement_cases import METRICS, head, token_values, variants

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
each_metric = pytest.mark.parametrize("metric", METRICS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [64, 100])
@pytest.mark.parametrize("whole", [True, False])
def test_products_block_by_block(dtype, V, whole, monkeypatch) -> None:
    monkeypatch.setattr(disagreement, "OUTPUTS", 32)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    rows = variants(2, 5, 12, 1.0, working)[1]
    rows[1] *= 2.0**-20 if dtype == torch.float16 else 1.0
    weight = head(V, 12, dtype)
    right = rows.to(working) @ weight.to(working).t()
    out = torch.full((5, V if whole else 32), torch.nan, dtype=working)
    first, limit = 0, rows.abs().amax(-1, keepdim=True) * torch.finfo(dtype).eps * 12
    for width in disagreement._multiply(rows, weight, dtype, out):
        assert width == min(32, V - first)
        block = out[:, first : first + width] if whole else out[:, :width]
        assert ((block - right[:, first : first + width]).abs() <= limit).all()
        first += width
    assert first == V
    assert not whole or not out.isnan().any()


def test_rows_are_far_from_row_0_where_differences_carry_more_rounding() -> None:
    """More than its norm / sqrt 2; the farthest row counts."""
    base = torch.tensor([3.0, 0.0, 4.0])  # of norm 5
    apart = torch.tensor([3.4, 3.6, 0.0, -3.6])
    rows = base.repeat(3, 5, 1)
    rows[1, :4, 1] = apart
    rows[2, 0, 0] += 0.1
    rows[:, 4] = 0
    assert disagreement._far(rows).tolist() == [False, True, False, True, False]
    rows[2, 2, 1] = 4.0
    assert disagreement._far(rows).tolist() == [False, True, True, True, False]


def test_pieces_that_stay_in_the_cache(monkeypatch) -> None:
    rows = torch.zeros(3, 10, 20)
    for size, pieces in ((3 * 20 * 4 * 4, [4, 4, 2]), (3 * 20 * 4 * 10, [10]), (1, [1] * 10)):
        monkeypatch.setattr(disagreement, "CACHE_BYTES", size)
        parts = disagreement._parts(rows)
        assert [part.shape[1] for part in parts] == pieces
        assert all(part.shape == (3, part.shape[1], 20) for part in parts)


def test_where_the_kernel_compares(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(metrics, "ready", lambda *of: asked.append(of) or True)
    pytest.importorskip("triton")
    card, cpu = torch.device("cuda"), torch.device("cpu")
    for interpreted in (False, True):
        monkeypatch.setattr(metrics, "INTERPRETED", interpreted)
        for R, dtype in ((2, torch.float32), (16, torch.bfloat16)):
            assert metrics.has_kernel(R, card, dtype) is True
            assert asked.pop() == ("disagreement_pairs", card, torch.bfloat16)
            assert metrics.has_kernel(R, cpu, dtype) is interpreted
        assert metrics.has_kernel(17, card, torch.float32) is False
        assert metrics.has_kernel(2, card, torch.float64) is False
    monkeypatch.setattr(metrics, "HAS_TRITON", False)
    assert metrics.has_kernel(2, card, torch.float32) is False


@each_metric
@pytest.mark.parametrize("working", [torch.float32, torch.float64])
def test_pairs_of_outputs_and_of_row_0(metric, working) -> None:
    """Each metric alone, with a class ruled out by one row at one token."""
    f = variants(4, 3, 6, 1.0, working)
    f[2, 1, 3] = -INF
    found = metrics.compare(f.clone(), metric, True, working)
    near = metrics.compare(f.clone(), metric, False, working)
    rows = f.double().numpy()
    with np.errstate(invalid="ignore"):
        right = np.array([[token_values(a, b, metric) for b in rows] for a in rows])
    right = torch.tensor(right) * (6 if metric == "l1" else 1)  # summed
    right.diagonal().zero_()
    if metric == "kl":  # torch's kl_div multiplies 0 and -inf
        p, log_p = f.double().softmax(-1), f.double().log_softmax(-1)
        right[2] = torch.where(p[2] == 0, 0, p[2] * (log_p[2] - log_p)).sum(-1)
    assert found.dtype == near.dtype == torch.float64 and found.shape == (4, 4, 3)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(near, right[1:, 0], rtol=1e-5, atol=1e-6)
    assert not found.diagonal().any()


def test_probabilities_that_move_by_a_factor() -> None:
    """tv from p and what is added to its logits, large and small."""
    f, p = variants(4, 3, 9, 1.0), variants(2, 3, 9, 1.0)[1].softmax(-1)
    f[1] += 20.0
    moved = (p.double().log() + f.double()).softmax(-1)
    moved[0] = p.double()
    right = (moved[:, None] - moved).abs().sum(-1) / 2
    for pairs, wanted in ((True, right), (False, right[1:, 0])):
        found = metrics.tv_of_deltas(f.clone(), p, pairs)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


# The bound on a card's memory, of sizes alone

SHAPES_OF_HEADS = [(8, 2048, 576, 49152), (8, 2048, 1024, 151936), (16, 4096, 4096, 128256)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES_OF_HEADS)
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_chunk_on_a_card_holds_a_tenth_of_the_logits(metric, shape, kernel, dtype) -> None:
    R, N, D, V = shape
    chunk = disagreement.chunk_tokens("cuda", R, N, D, V, metric, dtype, kernel)
    width = min(V, disagreement.GPU_OUTPUTS) if metric == "l1" else V
    products = R * chunk * width * 4
    held = disagreement.held_copies(metric, kernel) * products
    chunks = disagreement.chunks_at_once("cuda", R, N, D, V, dtype, chunk)
    prepared = R * chunk * chunks * D * (dtype.itemsize + 8)
    assert 1 <= chunk <= N and products <= disagreement.GPU_BYTES
    assert held + prepared <= R * N * V * dtype.itemsize / 10
    assert chunks == 1 or prepared <= R * N * V * dtype.itemsize / 40
    assert products > 4 << 20  # enough for a card to do


def test_a_card_prepares_many_small_chunks_at_once() -> None:
    def chunks(device, V, step=8):
        return disagreement.chunks_at_once(device, 8, 2048, 64, V, torch.bfloat16, step)

    assert chunks("cuda", 49152) > 2
    assert chunks("cuda", None) == chunks("cpu", 49152) == chunks("cuda", 49152, 10**9) == 1


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("metric", METRICS)
def test_several_chunks_at_once_are_as_one_after_the_other(metric, pairs, monkeypatch) -> None:
    hidden, weight = variants(4, 23, 8, 1.0), variants(1, 90, 8, 1.0)[0]
    hidden[1:, 3:9] = hidden[0, 3:9] + 1e-3 * hidden[1:, 3:9]
    hidden[2, 5, 1], hidden[0, 7] = torch.nan, torch.inf
    mask = torch.arange(23) % 5 != 0
    monkeypatch.setattr(disagreement, "chunk_tokens", lambda *_: 4)
    options = dict(metric=metric, mask=mask, reduction="sum")
    found = []
    for chunks in (1, 2, 3, 10):
        monkeypatch.setattr(disagreement, "chunks_at_once", lambda *_, n=chunks: n)
        options |= {} if pairs else dict(reference=hidden[0].clone(), reduction="none")
        found.append(disagreement.pairwise_disagreement(hidden, weight, **options))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-9, equal_nan=True)
        assert pairs or metric == "l1" or torch.equal(other.nan_to_num(), found[0].nan_to_num())


def test_chunks_of_small_and_of_huge_problems() -> None:
    def chunk(device, R, N, D, V, metric="tv", dtype=torch.bfloat16):
        return disagreement.chunk_tokens(device, R, N, D, V, metric, dtype, True)

    assert chunk("cuda", 8, 100, 32, 1000) >= 100  # a tenth of little is not worth its launches
    assert chunk("cuda", 16, 10**6, 4096, 128256) * 16 * 128256 * 4 <= disagreement.GPU_BYTES
    assert chunk("cuda", 16, 1, 64, 10**8) == chunk("cpu", 16, 1, 64, 10**8) == 1
    assert chunk("cuda", 8, 4096, 1024, None) > chunk("cpu", 8, 4096, 1024, None)
    assert chunk("cpu", 8, 10**6, 64, 49152) == chunk("cpu", 8, 10, 64, 49152)
    assert chunk("cpu", 8, 10**6, 64, 49152, "l1") == disagreement.ROWS // 8
