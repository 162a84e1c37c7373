"""The C++ operators one by one: values, bits, bounds, schemas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from adarank_kernels.lora.backends import cpu
from adarank_kernels.lora.dropout import keep_mask
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
pytestmark = pytest.mark.skipif(
    not cpu.usable(torch.zeros(1)), reason="no C++ compiler, or not x86-64 Linux"
)


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
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


def arguments_of(dtype: torch.dtype, low: torch.dtype) -> dict[str, tuple[Any, ...]]:
    first, width = layout((3, 8), dtype)
    X, Y, S = randn(9, 20).to(dtype), randn(9, 12).to(dtype), low_rank(9, (3, 8), dtype)
    As = [randn(3, 20).to(low), randn(8, 20).to(low)]
    B, bias = randn(12, 8).to(low), randn(12).to(dtype)
    W, parts = randn(12, 20).to(dtype), []
    for A in As:
        parts += [W, bias, A, randn(12, len(A)).to(low)]
    return {
        "drop": (X, SEED, 0.3),
        "shrink": (X, As, first, width, SEED, 0.3),
        "expand_": (Y, S, B, first[1], 0.5, bias),
        "grad_s_": (S.clone(), Y, B, first[1], 0.5),
        "grad_b": (Y, S, first[1], 8, 0.5, low),
        "grad_a": (S, X, first, [3, 8], low, SEED, 0.3),
        "grad_x_": (X, S, As, first, SEED, 0.3),
        "group_forward": (X, parts, [], 0, [0.5, 2.0], 0.3, SEED, 1, True, None),
        "group_backward": (
            *([Y, Y], X, S, None, parts, [0.5, 2.0], 0.3, SEED, 1, None, True, 3, 3, [9, 20]),
        ),
        "philox": (7, 0, 0, 2, 5),
        "knows": (dtype,),
    }


@pytest.mark.parametrize("name", ["drop", "shrink", "expand_", "grad_s_", "grad_b", "grad_a"])
def test_opcheck(dtypes: tuple[torch.dtype, torch.dtype], name: str) -> None:
    torch.library.opcheck(getattr(ops, name), arguments_of(*dtypes)[name])


def test_opcheck_of_grad_x(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for seed in (None, SEED):
        arguments = arguments_of(*dtypes)["grad_x_"]
        torch.library.opcheck(ops.grad_x_, (*arguments[:4], seed, 0.3))


@pytest.mark.parametrize("name", ["group_forward", "group_backward", "philox"])
def test_schemas_of_what_compilers_do_not_see(
    dtypes: tuple[torch.dtype, torch.dtype], name: str
) -> None:
    arguments = arguments_of(*dtypes)[name]
    before = [t._version for t in torch.utils._pytree.tree_leaves(arguments) if torch.is_tensor(t)]
    getattr(ops, name)(*arguments)
    after = [t._version for t in torch.utils._pytree.tree_leaves(arguments) if torch.is_tensor(t)]
    assert before == after
    schema = getattr(ops, name).default._schema
    assert not schema.is_mutable


# Bad input: never a crash


def bad_calls(dtype: torch.dtype) -> Iterator[tuple[str, int, Any]]:
    """(operator, argument, what is wrong in its place)."""
    wide = randn(9, 40).to(dtype)
    overlapping = randn(30).to(dtype).as_strided((9, 20), (1, 1))
    other = torch.float64 if dtype == torch.float32 else torch.float16
    far = 2**62
    for op, at in (("drop", 0), ("shrink", 0), ("grad_a", 1), ("grad_x_", 0)):
        yield from ((op, at, t) for t in (wide[0], wide[None], randn(9, 20).to(other)))
        yield from ((op, at, t) for t in (torch.tensor(1.0).to(dtype), wide.int()))
    for op, at in (("shrink", 1), ("grad_x_", 2)):
        for A in (randn(3, 21), randn(3), randn(1, 3, 20), randn(3, 20).to(other), randn(64, 20)):
            yield op, at, [A if A.dtype == other else A.to(dtype), randn(8, 20).to(dtype)]
        yield op, at, [randn(3, 20).to(dtype)]
    for op, at in (("shrink", 2), ("grad_x_", 3), ("grad_a", 2)):
        for wrong in ([0], [0, 4, 8], [0, -1], [0, 400], [-4, 4], [far, 4], [0, far], [0, -far]):
            yield op, at, wrong
    yield from (("shrink", 3, width) for width in (-1, 0, 2, 10, -far, far))
    for op, at in (("drop", 1), ("shrink", 4), ("grad_a", 5), ("grad_x_", 4)):
        yield from ((op, at, s) for s in (torch.tensor([1, 2]), torch.tensor([1.0]), SEED.int()))
    for op, at in (("drop", 2), ("shrink", 5), ("grad_a", 6), ("grad_x_", 5)):
        yield from ((op, at, p) for p in (-0.1, 1.1, float("nan"), float("inf"), 1e300))
    for op, at in (("expand_", 0), ("grad_s_", 1), ("grad_b", 0)):
        if op != "grad_b":  # whose features nothing else names
            yield op, at, randn(9, 13).to(dtype)
        yield from ((op, at, t) for t in (randn(8, 12).to(dtype), randn(9).to(dtype)))
        yield from ((op, at, t) for t in (randn(9, 12).to(other), randn(9, 12).int()))
    for op, at in (("expand_", 1), ("grad_s_", 0), ("grad_b", 1), ("grad_a", 0), ("grad_x_", 1)):
        for S in (wide[:8, :12], wide[:, :8], wide[0, :12], wide.to(other), wide.t()[:9]):
            yield op, at, S
        yield op, at, overlapping[:, :12]
    yield "expand_", 0, randn(12, 9).to(dtype).t()  # written into: must have its rows in order
    yield "expand_", 0, overlapping[:, :12]
    yield "grad_x_", 0, randn(20, 9).to(dtype).t()
    yield "grad_x_", 0, overlapping
    for op in ("expand_", "grad_s_"):
        for B in (randn(13, 8), randn(12), randn(12, 64), randn(1, 12, 8), randn(12, 8).to(other)):
            yield op, 2, B if B.dtype == other else B.to(dtype)
        yield from ((op, 3, start) for start in (-1, -far, 6, 400, far, 2**63 - 1))
    for bias in (randn(13).to(dtype), randn(1, 12).to(dtype), wide[0, :24:2], randn(12).to(other)):
        yield "expand_", 5, bias
    yield from (("grad_b", 2, start) for start in (-1, -far, 6, 400, far, 2**63 - 1))
    yield from (("grad_b", 3, rank) for rank in (-1, 64, far, -far, 2**63 - 1))
    yield from (("grad_a", 3, wrong) for wrong in ([3], [3, -8], [3, 64], [3, far], [3, 8, 1]))
    for op, at in (("grad_b", 5), ("grad_a", 4)):
        yield op, at, other
    if dtype == torch.bfloat16:
        yield "grad_x_", 1, wide[:, :13]  # pairs of columns
        yield "shrink", 2, [0, 5]
    for wrong in ([0.5], [], [0.5, 1.0, 2.0]):
        yield "group_forward", 4, wrong
        yield "group_backward", 5, wrong
    for padding in (0, -1):
        yield "group_forward", 7, padding
        yield "group_backward", 8, padding
    good = arguments_of(dtype, dtype)
    parts = good["group_forward"][1]
    larger = randn(5, 20).to(dtype), randn(12, 5).to(dtype)
    for wrong in (
        parts[:4],
        parts[:-1],
        parts * 2,
        [*parts[:2], larger[0], *parts[3:]],  # .data of a larger rank
        [*parts[:3], larger[1], *parts[4:]],
        [*parts[:3], None, *parts[4:]],
        [*parts[:3], randn(11, 3).to(dtype), *parts[4:]],
        [*parts[:2], randn(3, 19).to(dtype), *parts[3:]],
    ):
        yield "group_forward", 1, wrong
        yield "group_backward", 4, wrong
    yield "group_forward", 1, [None, *parts[1:]]
    yield "group_forward", 0, randn(9, 21).to(dtype)
    both = [*parts[:2], *larger, *parts[4:]]  # between forward and backward
    yield "group_backward", 4, both
    yield from (("group_backward", at, None) for at in (1, 2))
    yield "group_backward", 1, randn(8, 20).to(dtype)
    yield "group_backward", 2, randn(9, 6).to(dtype)
    yield "group_backward", 0, [randn(9, 12).to(dtype), randn(8, 12).to(dtype)]
    yield "group_backward", 0, [randn(9, 12).to(dtype)]
    yield "group_backward", 0, [randn(9, 12).to(dtype)] * 64
    yield "group_backward", 13, [9, 21]
    yield "philox", 3, -1
    yield "philox", 4, -1


@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=NAMES[:2], indirect=True)
def test_bad_input_raises(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype = dtypes[0]
    good = arguments_of(dtype, dtype)
    for name, arguments in good.items():
        getattr(ops, name)(*arguments)
    for name, at, wrong in bad_calls(dtype):
        arguments = list(good[name])
        arguments[at] = wrong
        said = wrong.shape if isinstance(wrong, Tensor) else wrong
        try:
            getattr(ops, name)(*arguments)
        except RuntimeError:
            continue
        except Exception as error:
            pytest.fail(f"{name}, argument {at}, {said}: {type(error).__name__}: {error}")
        pytest.fail(f"{name}, argument {at}: accepted {said}")


def test_a_freed_storage_is_refused() -> None:
    """FSDP frees what it has sharded; the shape stays."""
    A = randn(3, 20)
    A.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="needs more than its storage"):
        torch.ops.adarank.shrink(randn(9, 20), [A], [0], 3, None, 0.0)
