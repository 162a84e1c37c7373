"""The disagreement's kernels over many small tiles, and their formulas in float64."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton as compiler
import triton.language as tl
from torch import Tensor

from adarank_kernels.disagreement import metrics, triton
from adarank_kernels.disagreement.triton import _apart, _curve, _moved
from tests.kernels.disagreement_cases import METRICS, token_values, variants

INF = float("inf")
BY_KERNEL = METRICS[:4]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and splits in problems that the interpreter is soon through with."""
    monkeypatch.setitem(triton.PAIRS, "BLOCK_V", 32)
    monkeypatch.setattr(triton, "SPLIT", 64)


def guarded(tensor: Tensor) -> Tensor:
    """The same numbers in a buffer of NaN, which an edge that is passed shows."""
    R, tokens, V = tensor.shape
    buffer = tensor.new_full((R, tokens + 2, V + 3), torch.nan)
    buffer[:, 1:-1, :V] = tensor
    return buffer[:, 1:-1, :V]


def values(f: Tensor, metric: str) -> Tensor:
    """float64 [R, R, tokens] of other people's code; l1 summed."""
    rows = f.double().numpy()
    found = torch.tensor(np.array([[token_values(a, b, metric) for b in rows] for a in rows]))
    return found * f.shape[-1] if metric == "l1" else found


@pytest.mark.parametrize("metric", BY_KERNEL)
@pytest.mark.parametrize(("R", "tokens", "V"), [(2, 3, 150), (8, 3, 40), (9, 1, 33), (16, 2, 20)])
def test_pairs_of_rows(metric: str, R: int, tokens: int, V: int, small_tiles: None) -> None:
    f = variants(R, tokens, V, 1.0)
    right = values(f, metric)
    for centre in (f[0], torch.zeros_like(f[0])):
        options = {"shift": -centre, "base": centre.log_softmax(-1)} if metric != "l1" else {}
        ours = triton.compare(guarded(f), metric, **options)
        torch.testing.assert_close(ours, right, rtol=3e-6, atol=3e-7)
        near = triton.compare(guarded(f), metric, False, **options)
        torch.testing.assert_close(near, right[1:, 0], rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("metric", BY_KERNEL[1:])
@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_relative_to_row_0(metric: str, with_bias: bool, small_tiles: None) -> None:
    """Rows that are differences to row 0, and tokens where they are logits of their own."""
    f, far = variants(4, 5, 70, 1.0, torch.float64), torch.tensor([0, 1, 0, 0, 1]).bool()
    bias = variants(2, 1, 70, 1.0)[1, 0] if with_bias else None
    logits = torch.where(far[:, None], f, f - f[0]).float()
    logits[0] = f[0]
    right = values(f if bias is None else f + bias.double(), metric)
    for pairs, wanted in ((True, right), (False, right[1:, 0])):
        ours = metrics.relative(logits.clone(), far, bias, metric, pairs)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", BY_KERNEL[1:])
def test_a_row_whose_sum_is_far_from_its_base(metric: str, small_tiles: None) -> None:
    """Where the base is of another token the logsumexp is far from 0."""
    f = variants(3, 2, 40, 1.0)
    f[1] += 30.0
    f[2, :, 7] += 12.0
    options = {"shift": -f[0], "base": f[0].log_softmax(-1)}
    ours = triton.compare(guarded(f), metric, **options)
    torch.testing.assert_close(ours, values(f, metric), rtol=1e-5, atol=1e-6)


def test_sizes() -> None:
    cpu = torch.device("cpu")
    assert [triton.padded(R) for R in (2, 8, 9, 16)] == [8, 8, 16, 16]
    assert [metrics.has_kernel(R, cpu, torch.float32) for R in (2, 16, 17)] == [True, True, False]
    assert not metrics.has_kernel(2, cpu, torch.float64)
    wide, narrow = triton.pairs_options("l1"), triton.pairs_options("kl")
    assert wide == triton.PAIRS and narrow == wide | {"BLOCK_V": wide["BLOCK_V"] // 2}
    assert triton.SPLIT % wide["BLOCK_V"] == 0  # else splits overlap


# The formulas. Terms of a series as they should be, to the last digits of float64.


@compiler.jit
def formulas(
    x_ptr, y_ptr, base_ptr, curve_ptr, moved_ptr, apart_ptr, N: tl.constexpr, METRIC: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, N)
    x, y, base = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(base_ptr + i)
    tl.store(curve_ptr + i, _curve(y - x))
    tl.store(moved_ptr + i, _moved(base, y - x))
    tl.store(apart_ptr + i, _apart(x, y, tl.exp(base + x), base, METRIC))


def computed(x: Tensor, y: Tensor, base: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """(_curve, _moved, _apart) of float64 numbers."""
    curve, moved, apart = torch.empty(3, len(x), dtype=torch.float64)
    formulas[(1,)](x, y, base, curve, moved, apart, N=len(x), METRIC=metric)
    return curve, moved, apart


def series_of_js(d: Tensor) -> Tensor:
    """|d|/2 tanh(|d|/2) - log cosh(|d|/2): five terms, of the differential equation of tanh."""
    tanh = [Fraction(0), Fraction(1)]  # tanh' = 1 - tanh^2
    for n in range(1, 10):
        square = sum(tanh[i] * tanh[n - i] for i in range(n + 1))
        tanh.append(-square / (n + 1))
    terms = {n + 1: float(tanh[n] - tanh[n] / (n + 1)) for n in range(1, 10, 2)}
    return sum(((d / 2) ** n * term for n, term in terms.items()), torch.zeros_like(d))


NEAR = torch.linspace(-0.499, 0.499, 32, dtype=torch.float64)
FAR = torch.tensor(
    [sign * d for d in (0.5, 0.7, 1.2, 1.6, 2, 3, 5, 8) for sign in (1.0, -1.0)]
).double()


@pytest.mark.parametrize("metric", BY_KERNEL)
def test_formulas(metric: str) -> None:
    close = {"rtol": 1e-12, "atol": 0.0}
    for d in (NEAR, FAR):
        near = d is NEAR
        x = torch.arange(len(d), dtype=torch.float64) / 8 - 2  # 0.5 more or less is exact
        base, y = torch.linspace(-3, -1, len(d), dtype=torch.float64), x + d
        d = y - x
        curve, moved, apart = computed(x, y, base, metric)
        taylor = sum((d**n / math.factorial(n) for n in range(2, 9)), torch.zeros_like(d))
        torch.testing.assert_close(curve, taylor, **close)
        torch.testing.assert_close(moved, base.exp() * (d + taylor if near else d.expm1()), **close)
        p, q, half = (base + x).exp(), (base + y).exp(), d.abs() / 2
        if metric == "kl":
            right = p * taylor if near else q - p - p * d
        elif metric == "js":
            far = half * half.tanh() - half.cosh().log()
            right = (p + q) / 2 * (series_of_js(d) if near else far)
        else:
            right = d.abs()
        torch.testing.assert_close(apart, right, **close)


def test_the_series_are_as_good_as_float32() -> None:
    """The first term left out."""
    x = NEAR[NEAR != 0]
    curve, _, apart = computed(torch.zeros_like(x), x, torch.zeros_like(x), "js")
    right = sum((x**n / math.factorial(n) for n in range(2, 20)), torch.zeros_like(x))
    assert ((curve - right) / right).abs().max() < 5e-8
    half = x.abs() / 2
    entropies = (1 + x.exp()) / 2 * (half * half.tanh() - half.cosh().log())
    assert (apart - entropies).abs().max() < 1e-7 * entropies.max()


@pytest.mark.parametrize(
    ("metric", "right"),
    [
        ("l1", [INF, INF, 0, INF, 1]),
        ("kl", [math.exp(-1), INF, 0, 0, 0]),
        ("js", [math.exp(-1) / 2 * math.log(2), math.exp(-2) / 2 * math.log(2), 0, 0, 0]),
    ],
)
def test_formulas_of_what_is_ruled_out(metric: str, right: list[float]) -> None:
    x = torch.tensor([-INF, -1, -INF, -INF, 1, 0, 0, 0]).double()
    y = torch.tensor([0, -INF, -INF, 0, 2, 0, 0, 0]).double()
    base = torch.tensor([-1, -1, -1, -INF, -INF, 0, 0, 0]).double()
    with np.errstate(all="ignore"):
        apart = computed(x, y, base, metric)[2]
    torch.testing.assert_close(apart, torch.tensor([*right, 0, 0, 0]).double())


@pytest.mark.parametrize("d", [40.0, 99.0, 101.0, 300.0])
def test_js_of_rows_far_apart(d: float) -> None:
    zeros = torch.zeros(2, dtype=torch.float64)
    apart = computed(zeros, zeros - d, zeros, "js")[2]
    torch.testing.assert_close(apart, torch.full_like(apart, math.log(2) / 2), rtol=1e-12, atol=0)
