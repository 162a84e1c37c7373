"""The LoRA kernels over many small tiles, and the products that choose among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adarank_kernels.lora import triton_gradients_launch as gradients
from adarank_kernels.lora import triton_launch as launch
from adarank_kernels.lora.backends import torch as aten
from adarank_kernels.lora.backends import triton
from adarank_kernels.lora.dropout import keep_mask
from adarank_kernels.random.words import philox_words

SEED, DROPOUT = torch.tensor([2**62 + 99]), 0.3
AROUND = 32  # numbers before and after


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles each way in problems that the interpreter is soon through with."""
    for options, sizes in (
        (launch.SHRINK, {"BLOCK_M": 4, "BLOCK_K": 16}),
        (launch.EXPAND, {"BLOCK_M": 8, "BLOCK_N": 16}),
        (launch.DROP, {"BLOCK_M": 4, "BLOCK_K": 16}),
        (gradients.GRAD_S, {"BLOCK_M": 8, "BLOCK_K": 16}),
        (gradients.OUTER, {"BLOCK_M": 4, "BLOCK_N": 32}),
        (gradients.DROPPED, {"BLOCK_M": 4, "BLOCK_N": 32}),
        (gradients.TOTAL, {"BLOCK": 16, "AT_ONCE": 4}),
    ):
        for name, size in sizes.items():
            monkeypatch.setitem(options, name, size)
    launch._expand_constants.cache_clear()
    with np.errstate(divide="raise"):  # NumPy's integers give 0, a GPU's anything
        yield
    launch._expand_constants.cache_clear()


def guarded(tensor: Tensor, stride: int | None = None) -> Tensor:
    """The same rows, `stride` apart, in a buffer of NaN, 16 bytes from its begin."""
    N, K = tensor.shape
    stride = K if stride is None else stride
    buffer = tensor.new_full((N * stride + 2 * AROUND,), torch.nan)
    inside = buffer[AROUND : AROUND + N * stride].view(N, stride)[:, :K]
    inside.copy_(tensor)
    return inside


def untouched(tensor: Tensor) -> bool:
    """Whether only the tensor in its buffer is not NaN."""
    buffer = tensor._base
    assert buffer is not None
    return int(buffer.isnan().sum()) == buffer.numel() - tensor.numel() and bool(
        tensor.isfinite().all()
    )


def randn(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(*size, generator=generator)


@pytest.mark.parametrize(("N", "K", "R"), [(6, 40, 70), (8, 32, 16), (1, 7, 3), (5, 16, 33)])
@pytest.mark.parametrize("seed", [None, SEED])
def test_shrink(N: int, K: int, R: int, seed: Tensor | None) -> None:
    X, A = guarded(randn(N, K), K + 9), guarded(randn(R, K))
    kept = X if seed is None else X * keep_mask(seed, N, K, DROPOUT)
    for given in (X, X.t().contiguous().t()):
        torch.testing.assert_close(launch.shrink(given, A, seed, DROPOUT), kept @ A.t())


RANKS, OUTS = (3, 40, 16, 1, 24), (20, 32, 7, 16, 33)


@pytest.mark.parametrize(
    ("M", "N", "outs"), [(1, 1, OUTS), (2, 8, (48, 16)), (4, 8, OUTS), (5, 19, OUTS), (2, 19, OUTS)]
)
def test_expand(M: int, N: int, outs: tuple[int, ...]) -> None:
    ranks, outs, scalings = RANKS[:M], outs[:M], [0.5 + 0.25 * m for m in range(M)]
    first = [sum(map(launch.padded, ranks[:m])) for m in range(M)]
    S = guarded(torch.full((N, sum(map(launch.padded, ranks))), torch.nan))
    for rank, start in zip(ranks, first, strict=True):  # padding is not read
        S[:, start : start + rank] = randn(N, rank)
    Bs = [guarded(randn(out, rank)) for out, rank in zip(outs, ranks, strict=True)]
    Ys = [guarded(randn(N, out)) for out in outs]
    right = [
        Y + s * S[:, start : start + B.shape[1]] @ B.t()
        for Y, s, start, B in zip(Ys, scalings, first, Bs, strict=True)
    ]
    launch.expand(Ys, S, first, Bs, scalings)
    for Y, wanted in zip(Ys, right, strict=True):
        torch.testing.assert_close(Y, wanted)
        assert untouched(Y)


@pytest.mark.parametrize("dropout", [0.3, 0.5])
@pytest.mark.parametrize(("N", "K"), [(11, 40), (4, 32), (2, 90), (1, 7)])
def test_drop(N: int, K: int, dropout: float) -> None:
    X, into = guarded(randn(N, K), K + 9), guarded(randn(N, K, seed=1))
    expected = X * keep_mask(SEED, N, K, dropout)
    assert torch.equal(launch.drop(X, SEED, dropout), expected)
    added = into + expected
    assert launch.drop(X, SEED, dropout, into) is into
    assert torch.equal(into, added) and untouched(into)


def test_a_half_word_at_the_threshold_is_kept() -> None:
    X = torch.ones(1, 8)
    words = philox_words(SEED, torch.tensor([0]), torch.tensor([0]))
    halves = [int(word) >> shift & 0xFFFF for word in words for shift in (0, 16)]
    assert {half % 2 for half in halves} == {0, 1}
    for column, half in enumerate(halves):
        assert launch.drop(X, SEED, half / 65536)[0, column] == 1
        assert launch.drop(X, SEED, (half + 1) / 65536)[0, column] == 0


SHARED = ((3, 40, 16, 1, 24), (80, 32, 48, 16, 112))  # ranks, outs
SCALINGS = [0.5, 1.0, 2.0, 0.25, 1.5]


@pytest.mark.parametrize("shares", [1, 2, 3, 5])
@pytest.mark.parametrize(("M", "N"), [(1, 1), (1, 8), (2, 19), (5, 21)])
def test_shares_of_the_gradients(
    M: int, N: int, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of them have nothing to add."""
    monkeypatch.setattr(gradients, "_shares", lambda *_: shares)
    ranks, outs, scalings = SHARED[0][:M], SHARED[1][:M], SCALINGS[:M]
    first = [sum(map(launch.padded, ranks[:m])) for m in range(M)]
    width = sum(map(launch.padded, ranks))
    dYs = [guarded(randn(N, out, seed=m), out + 16) for m, out in enumerate(outs)]
    Bs = [guarded(randn(out, rank)) for out, rank in zip(outs, ranks, strict=True)]
    S = guarded(torch.full((N, width), torch.nan), width + 16)
    for rank, start in zip(ranks, first, strict=True):  # padding is not read
        S[:, start : start + rank] = randn(N, rank)
    dS = gradients.grad_s(dYs, Bs, scalings, first, width)
    dBs = gradients.grad_b(dYs, S, first, ranks, scalings, torch.float32)
    right = torch.zeros(N, width)
    each = zip(dYs, Bs, scalings, first, ranks, dBs, strict=True)
    for dY, B, scaling, start, rank, dB in each:
        right[:, start : start + rank] = scaling * dY @ B
        torch.testing.assert_close(dB, scaling * dY.t() @ S[:, start : start + rank])
    torch.testing.assert_close(dS, right)  # zeros in the padding
    X, S = guarded(randn(N, 80), 96), guarded(randn(N, width), width + 16)
    dA = gradients.grad_a(S, X, SEED, DROPOUT, torch.float32)
    torch.testing.assert_close(dA, S.t() @ (X * keep_mask(SEED, N, 80, DROPOUT)))


@pytest.mark.parametrize("shares", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("size", [1, 16, 35])
def test_the_sum_of_shares(size: int, shares: int) -> None:
    given, out = guarded(randn(shares, size)), guarded(torch.zeros(1, size))
    gradients._total(given, out[0])
    torch.testing.assert_close(out[0], given.sum(0))
    assert untouched(out)


# Which kernel computes which product: torch's products are right, whoever is chosen

ALL = {"lora_shrink", "lora_expand", "lora_drop"}
BACKWARD = {"lora_grad_s", "lora_grad_b", "lora_grad_a"}
KIND_OF_SEED = ("none", "seed", "mask")
N, WIDTH, WIDE = 9, 32, (3, 17, 8)


@pytest.fixture(
    params=[set(), {"lora_shrink"}, {"lora_expand"}, {"lora_drop"}, ALL, ALL | BACKWARD],
    ids=lambda names: "+".join(sorted(names)) or "none",
)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that passed their checks."""
    monkeypatch.setattr(
        triton, "ready_among", lambda names, *_: frozenset(request.param & {*names})
    )
    return request.param


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels, as they are launched."""
    made: list[str] = []

    def note(name: str, right: Any) -> Any:
        return lambda *arguments: made.append(f"lora_{name}") or right(*arguments)

    for module, names in (
        (launch, ("shrink", "expand", "drop")),
        (gradients, ("grad_s", "grad_b", "grad_a")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, note(name, getattr(module, name)))
    return made


def seed_of(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    return SEED if kind == "seed" else keep_mask(SEED, N, WIDTH, DROPOUT).float()


def group(out: int = 20) -> tuple[Tensor, list[Tensor], list[Tensor], list[int], int]:
    """X, As, Bs, first columns, width: ranks fill up their segments."""
    first = [0, 16, 48]
    As = [randn(rank, WIDTH) for rank in WIDE]
    return randn(N, WIDTH), As, [randn(out, rank) for rank in WIDE], first, 64


def segments(S: Tensor) -> list[Tensor]:
    return [S[:, start : start + rank] for start, rank in zip((0, 16, 48), WIDE, strict=True)]


@pytest.mark.parametrize("kind", KIND_OF_SEED)
def test_forward(kind: str, chosen: set[str], launched: list[str]) -> None:
    (X, As, _, first, width), seed = group(), seed_of(kind)
    wanted = {"lora_drop"} & chosen if kind == "seed" else set()
    dropped = aten.drop(X, seed, DROPOUT)
    assert torch.equal(triton.drop(X, seed, DROPOUT), dropped) and {*launched} == wanted
    launched.clear()
    S, A = triton.shrink(X, As, first, width, seed, DROPOUT)
    wanted = {"lora_shrink"} & chosen or {"lora_drop"} & chosen if kind == "seed" else set()
    assert {*launched} == wanted
    assert A is not None and torch.equal(A, aten.pack(As, first, width, torch.float32))
    for part, A in zip(segments(S), As, strict=True):
        torch.testing.assert_close(part, dropped @ A.t())


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("like", ["rows", "columns", "float64", "one in float64"])
def test_expand_in_place(in_place: bool, like: str, chosen: set[str], launched: list[str]) -> None:
    _, _, Bs, first, width = group()
    S, Ys = randn(N, width), [randn(N, 20, seed=m) for m in range(3)]
    if like == "columns":
        Ys[1] = Ys[1].t().contiguous().t()
    if "float64" in like:
        Ys = [Y.double() if like == "float64" or m == 2 else Y for m, Y in enumerate(Ys)]
    before = [Y.clone() for Y in Ys]
    found = triton.expand(Ys, S, Bs, first, [0.5, 1.0, 2.0], in_place)
    assert {*launched} == ({"lora_expand"} & chosen if in_place and like == "rows" else set())
    parts = zip(before, segments(S), Bs, (0.5, 1.0, 2.0), found, Ys, strict=True)
    for Y, S_m, B, scaling, ours, given in parts:
        torch.testing.assert_close(ours, (Y + scaling * S_m @ B.t()).to(Y.dtype))
        assert (ours is given or ours.data_ptr() == given.data_ptr()) == in_place


@pytest.mark.parametrize("kind", KIND_OF_SEED)
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_gradient_of_the_input(
    kind: str, there: bool, packed: bool, chosen: set[str], launched: list[str]
) -> None:
    (_, As, _, first, width), seed, dX = group(), seed_of(kind), randn(N, WIDTH, seed=5)
    dS = torch.zeros(N, width)
    for part in segments(dS):
        part.copy_(randn(*part.shape))
    A = aten.pack(As, first, width, torch.float32)
    given = dX.clone() if there else None
    # what is packed already is taken as it is: here it has other numbers
    scale = 2.0 if packed else 1.0
    right = aten.drop(dS @ (scale * A), seed, DROPOUT) + (dX if there else 0)
    ours = triton.grad_X(given, dS, As, first, scale * A if packed else None, seed, DROPOUT)
    torch.testing.assert_close(ours, right)
    assert given is None or ours.data_ptr() == given.data_ptr()
    assert {*launched} == ({"lora_drop"} & chosen if kind == "seed" else set())


@pytest.mark.parametrize("out", [20, 32])
@pytest.mark.parametrize("M", [1, 3])
def test_gradient_of_the_low_rank_product(
    M: int, out: int, chosen: set[str], launched: list[str]
) -> None:
    _, _, Bs, first, _ = group(out)
    dYs, scalings = [randn(N, out, seed=m) for m in range(M)], [0.5, 1.0, 2.0]
    width = 64 if M > 1 else 16 if BACKWARD <= chosen else 3
    dS = triton.grad_S(dYs, Bs[:M], scalings[:M], first[:M], width)
    assert {*launched} == ({"lora_grad_s"} & chosen if out == 32 else set())
    assert dS.shape == (N, width)
    right = torch.zeros(N, width)
    for dY, B, scaling, start in zip(dYs, Bs, scalings, first, strict=False):
        right[:, start : start + B.shape[1]] = scaling * dY @ B
    torch.testing.assert_close(dS, right)  # zeros in the padding


@pytest.mark.parametrize("out", [20, 32])
@pytest.mark.parametrize("kind", KIND_OF_SEED)
def test_gradients_of_the_factors(
    kind: str, out: int, chosen: set[str], launched: list[str]
) -> None:
    (X, As, _, first, width), seed = group(), seed_of(kind)
    S, dS = (randn(N, width, seed=seed) for seed in (1, 2))
    dAs = triton.grad_A(dS, X, As, first, seed, DROPOUT)
    wanted = {"lora_grad_a"} & chosen or {"lora_drop"} & chosen if kind == "seed" else set()
    assert {*launched} == wanted
    for dS_m, A, dA in zip(segments(dS), As, dAs, strict=True):
        torch.testing.assert_close(dA, dS_m.t() @ aten.drop(X, seed, DROPOUT))
        assert dA.shape == A.shape
    launched.clear()
    dYs, dtypes = [randn(N, out, seed=m) for m in range(3)], [torch.float32, torch.bfloat16] * 2
    dBs = triton.grad_B(dYs, S, first, WIDE, [0.5, 1.0, 2.0], dtypes[:3])
    assert {*launched} == ({"lora_grad_b"} & chosen if out == 32 else set())
    for dY, S_m, scaling, dtype, dB in zip(
        dYs, segments(S), (0.5, 1.0, 2.0), dtypes[:3], dBs, strict=True
    ):
        torch.testing.assert_close(dB, (scaling * dY.t() @ S_m).to(dtype))


def test_the_dtype_of_a_products_gradients() -> None:
    """That of all the factors, or float32."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert triton.common([bf16] * 3) == bf16 and triton.common([fp32]) == fp32
    assert triton.common([bf16, fp32]) == triton.common([fp32, bf16]) == fp32
    assert triton.common([bf16, fp16, bf16]) == fp32
