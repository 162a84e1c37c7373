"""The products with few ranks one by one: torch's and the C++ operators' share a contract."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from adarank_kernels.lora import dropout, group, op
from adarank_kernels.lora.backends import cpu
from adarank_kernels.lora.backends import torch as aten
from adarank_kernels.lora.dropout import keep_mask
from adarank_kernels.runtime import native

SEED, DROPOUT = torch.tensor([2**61 + 77]), 0.3
N, WIDTH, OUT = 9, 20, 12
RANKS, FIRST, RANK_SUM = (3, 1, 8), (0, 3, 4), 12
SCALINGS = (0.5, 1.0, 2.0)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(params=[aten, cpu], ids=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    if request.param is cpu and not cpu.usable(torch.zeros(1)):
        pytest.skip("no C++ compiler, or not x86-64 Linux")
    return request.param


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)))


As, Bs = [randn(rank, WIDTH) for rank in RANKS], [randn(OUT, rank) for rank in RANKS]


def segment(S: Tensor, m: int) -> Tensor:
    return S[:, FIRST[m] : FIRST[m] + RANKS[m]]


def mask_of(seed: Tensor | None) -> Tensor:
    return torch.ones(N, WIDTH) if seed is None else keep_mask(seed, N, WIDTH, DROPOUT).float()


@pytest.mark.parametrize("seed", [None, SEED])
def test_forward(backend: ModuleType, seed: Tensor | None) -> None:
    X = randn(N, WIDTH)
    dropped = X * mask_of(seed)
    assert torch.equal(backend.drop(X, seed, DROPOUT), dropped)
    S, _ = backend.shrink(X, As, FIRST, RANK_SUM, seed, DROPOUT)
    assert S.shape == (N, RANK_SUM)
    for m, A in enumerate(As):
        torch.testing.assert_close(segment(S, m), dropped @ A.t())


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expand(backend: ModuleType, in_place: bool, dtype: torch.dtype) -> None:
    """Also into the products of a foreign base, which keep their dtype."""
    S, Ys = randn(N, RANK_SUM), [randn(N, OUT, seed=m).to(dtype) for m in range(3)]
    before = [Y.clone() for Y in Ys]
    found = backend.expand(Ys, S, Bs, FIRST, SCALINGS, in_place)
    for m, (Y, ours, given) in enumerate(zip(before, found, Ys, strict=True)):
        right = Y + (SCALINGS[m] * segment(S, m) @ Bs[m].t())
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)
        assert (ours.data_ptr() == given.data_ptr()) == in_place
        assert in_place or torch.equal(given, Y)


@pytest.mark.parametrize("M", [1, 3])
def test_gradients_of_S_and_B(backend: ModuleType, M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dYs, S = [randn(N, OUT, seed=m) for m in range(M)], randn(N, RANK_SUM)
    if M == 1:
        monkeypatch.setattr(torch, "cat", None)  # a lone module's is not copied
    dS = backend.grad_S(dYs, Bs[:M], SCALINGS[:M], FIRST[:M], sum(RANKS[:M]))
    assert dS.shape == (N, sum(RANKS[:M]))
    for m, dY in enumerate(dYs):
        torch.testing.assert_close(segment(dS, m), SCALINGS[m] * dY @ Bs[m])
    dtypes = [BF16 if backend is aten and m == 1 else FP32 for m in range(M)]
    dBs = backend.grad_B(dYs, S, FIRST[:M], RANKS[:M], SCALINGS[:M], dtypes)
    for m, (dY, dB) in enumerate(zip(dYs, dBs, strict=True)):
        right = SCALINGS[m] * dY.t() @ segment(S, m)
        torch.testing.assert_close(dB, right.to(dtypes[m]))


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("seed", [None, SEED])
def test_gradient_of_the_input(backend: ModuleType, seed: Tensor | None, there: bool) -> None:
    dS, dX = randn(N, RANK_SUM), randn(N, WIDTH, seed=5)
    right = dS @ torch.cat(As) * mask_of(seed) + (dX if there else 0)
    ours = backend.grad_X(dX.clone() if there else None, dS, As, FIRST, None, seed, DROPOUT)
    torch.testing.assert_close(ours, right)
    alone = backend.grad_X(None, dS[:, :3], As[:1], (0,), None, seed, DROPOUT)
    torch.testing.assert_close(alone, dS[:, :3] @ As[0] * mask_of(seed))


def test_gradient_of_the_input_with_padded_ranks() -> None:
    dS, first = torch.zeros(2, 24), (0, 8, 12)
    for start, rank in zip(first, RANKS, strict=True):
        dS[:, start : start + rank] = randn(2, rank)
    right = sum(dS[:, start : start + len(A)] @ A for start, A in zip(first, As, strict=True))
    torch.testing.assert_close(aten.grad_X(None, dS, As, first, None, None, 0.0), right)


@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("dtypes", [(FP32,) * 3, (FP32, BF16, FP32), (BF16,) * 3])
def test_gradients_of_A(
    backend: ModuleType, seed: Tensor | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    if backend is cpu and dtypes == (BF16,) * 3:
        pytest.skip("factors of float32 rows are in float32")
    dS, X = randn(N, RANK_SUM), randn(N, WIDTH)
    given = [A.to(dtype) for A, dtype in zip(As, dtypes, strict=True)]
    found = backend.grad_A(dS, X, given, FIRST, seed, DROPOUT)
    for m, (dA, dtype) in enumerate(zip(found, dtypes, strict=True)):
        right = segment(dS, m).t() @ (X * mask_of(seed))
        torch.testing.assert_close(dA, right.to(dtype))


# In torch: masks that were drawn, and the packed factors


def test_a_mask_in_place_of_a_seed() -> None:
    X, dS, mask = randn(N, WIDTH), randn(N, RANK_SUM), mask_of(SEED)
    for kind in (FP32, torch.bool):
        assert torch.equal(aten.drop(X, mask.to(kind), 0.0), X * mask)
    packed = 2 * torch.cat(As)  # taken as it is
    ours = aten.grad_X(None, dS, As, FIRST, packed, mask, 0.0)
    torch.testing.assert_close(ours, dS @ packed * mask)


@pytest.mark.parametrize("widths", [(3, 1, 8), (4, 2, 8), (16, 16, 16), (6, 3, 9)])
def test_packed_rows(widths: tuple[int, ...]) -> None:
    first = [sum(widths[:m]) for m in range(3)]
    for dtype in (FP32, BF16):
        packed = aten.pack(As, first, sum(widths), dtype)
        assert packed.shape == (sum(widths), WIDTH) and packed.dtype == dtype
        for A, start, width in zip(As, first, widths, strict=True):
            rows = packed[start : start + width]
            assert torch.equal(rows[: len(A)], A.to(dtype))
            others = {tuple(row) for row in A.to(dtype).tolist()}
            assert {tuple(row) for row in rows.tolist()} <= others  # no NaN, no zeros
    alone = aten.pack(As[:1], [0], 3, FP32)
    assert alone is As[0] and aten.pack(As[:1], [0], 4, FP32).shape == (4, WIDTH)


def test_a_scaled_product_is_rounded_once() -> None:
    a, b = randn(40, 30).bfloat16(), randn(30, 50).bfloat16()
    for scaling in (1.0, 2.0, 0.3):
        right = (scaling * (a.double() @ b.double())).float()
        ours = aten.scaled_mm(a, b, scaling)
        # bfloat16's half step, and float32's sums of 30 terms
        torch.testing.assert_close(ours.float(), right, rtol=2**-8, atol=1e-5)
        twice = (torch.mm(a, b) * scaling).float()
        once = (ours.float() - right).abs().sum() < (twice - right).abs().sum()
        assert once == (scaling == 0.3), scaling  # a power of two rounds nothing
    assert aten.cast(a, BF16) is a and aten.cast(a, FP32).dtype == FP32


# Which dtypes the operators take


def test_torch_is_a_module_of_the_backends() -> None:
    assert group.aten is op.aten is cpu.aten is aten and aten.__name__.endswith("backends.torch")


@pytest.mark.parametrize("known", [[], [FP32], [FP32, BF16]])
def test_usable_dtypes_are_those_the_operators_know(
    known: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []
    operators = SimpleNamespace(knows=lambda dtype: asked.append(dtype) or dtype in known)
    monkeypatch.setattr(cpu, "_usable", {})
    monkeypatch.setattr(cpu, "_register_fakes", lambda: asked.append(FP32))
    monkeypatch.setattr(native, "operators", lambda: operators if known else None)
    x = torch.zeros(2)
    for _ in range(2):
        assert cpu.usable(x) == (FP32 in known) and cpu.usable(x.bfloat16()) == (BF16 in known)
    assert asked == ([FP32, *cpu.DTYPES] if known else [])  # once
    assert not cpu.usable(x.double()) and not cpu.usable(x.to("meta"))
    assert cpu.usable(x, None, x) == bool(known) and not cpu.usable(x, x.half())
    if BF16 in known:
        assert cpu.usable(x.bfloat16(), x, x.bfloat16()) and not cpu.usable(x, x.bfloat16())


# Seeds and masks


def test_seeds_and_what_is_dropped() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seeds = torch.cat([dropout.draw_seed(torch.device("cpu")) for _ in range(64)])
    assert seeds.shape == (64,) and seeds.dtype == torch.int64
    assert seeds.min() >= 0 and seeds.max() > 2**62 and len(set(seeds.tolist())) == 64
    assert (
        not dropout.is_mask(None) and not dropout.is_mask(seeds) and dropout.is_mask(SEED.float())
    )
    for p, level in ((0.0, 0), (0.25, 2**14), (0.3, 19661), (1.0, 2**16)):
        assert dropout.threshold(p) == level
        assert dropout.keep_probability(p) == 1 - level / 2**16
        assert dropout.keep_scale(p) == (0.0 if p == 1 else 2**16 / (2**16 - level))
    assert dropout.threshold(1 - 2**-17) == 2**16 and dropout.keep_scale(1 - 2**-17) == 0.0


@pytest.mark.parametrize(("p", "kept"), [(0.0, 45), (2**-16, 45), (1 - 2**-16, 0), (1.0, 0)])
def test_masks_that_drop_hardly_anything_or_all(p: float, kept: int) -> None:
    mask = keep_mask(SEED, 5, 9, p)
    assert mask.shape == (5, 9) and mask.dtype == torch.bool
    assert int(mask.sum()) == kept


@pytest.mark.parametrize("loaded", [False, True])
def test_a_half_word_at_the_threshold_is_kept(
    loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loaded and native.operators() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(dropout, "is_loaded", lambda: loaded)
    words = dropout.philox_words(SEED, torch.tensor([0]), torch.tensor([0]))
    halves = [int(word) >> shift & 0xFFFF for word in words for shift in (0, 16)]
    assert {half % 2 for half in halves} == {0, 1}
    for column, half in enumerate(halves):
        assert keep_mask(SEED, 1, 8, half / 65536)[0, column]
        assert not keep_mask(SEED, 1, 8, (half + 1) / 65536)[0, column]


@pytest.mark.parametrize("columns", [8, 9])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_mask_on_the_cpu_is_made_in_chunks(
    columns: int, loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One counter to eight columns, no more."""
    made: list[tuple[int, int, int]] = []
    words, of_chunk = dropout.philox_words, torch.ops.adarank.philox if loaded else None

    def in_torch(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, ...]:
        made.append((int(c1[0]), len(c1), len(c0)))
        return words(seed, c0, c1)

    def in_cpp(key: int, first: int, row: int, rows: int, columns: int) -> Tensor:
        made.append((row, rows, columns))
        return of_chunk(key, first, row, rows, columns)

    monkeypatch.setattr(dropout, "is_loaded", lambda: loaded)
    monkeypatch.setattr(dropout, "philox_words", in_torch)
    if loaded:
        if native.operators() is None:
            pytest.skip("no C++ compiler")
        monkeypatch.setattr(torch.ops.adarank, "philox", in_cpp)
    keep_mask(SEED, 515, columns, 0.3)
    groups = -(-columns // 8)
    assert made == [(0, 256, groups), (256, 256, groups), (512, 3, groups)]


class Watched(Tensor):
    """A mode stands behind it: what it holds is not for the host."""

    def __int__(self) -> int:
        raise AssertionError


def test_a_seed_that_the_host_may_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = SEED.clone().as_subclass(Watched)
    assert torch.equal(keep_mask(watched, 300, 9, 0.3), keep_mask(SEED, 300, 9, 0.3))
    assert keep_mask(SEED.to("meta"), 300, 9, 0.3).shape == (300, 9)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(Tensor, "__int__", Watched.__int__)
    assert keep_mask(SEED, 300, 9, 0.3).shape == (300, 9)
