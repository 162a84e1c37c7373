"""What the launchers of the LoRA kernels hand to Triton. Nothing is launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from adarank_kernels.lora import triton_launch as launch
from adarank_kernels.lora.dropout import threshold
from adarank_kernels.runtime.registry import cdiv

BF16, FP32 = torch.bfloat16, torch.float32
SEED = torch.tensor([3])


class Launch(NamedTuple):
    kernel: Any
    key: Any
    grid: tuple[int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    made: list[Launch] = []
    monkeypatch.setattr(launch, "launch", lambda *arguments: made.append(Launch(*arguments)))
    return made


def rows(
    N: int, K: int, dtype: torch.dtype = BF16, offset: int = 0, stride: int | None = None
) -> Tensor:
    """[N, K] in numbers of its own, `offset` elements behind a multiple of 64 bytes."""
    stride = K if stride is None else stride
    buffer = torch.randn(offset + max(N, 1) * stride + 64, dtype=dtype)
    return buffer.as_strided((N, K), (stride, 1), offset)


def by_shrink(
    N: int = 32, K: int = 64, R: int = 16, dtype: torch.dtype = BF16, dropout: float = 0.0,
    x: int = 0, a: int = 0, stride: int | None = None,
) -> None:  # fmt: skip
    X, A = rows(N, K, dtype, x, stride), rows(R, K, dtype, a)
    launch.shrink(X, A, SEED if dropout else None, dropout)


def by_drop(
    N: int = 32, K: int = 64, dtype: torch.dtype = BF16, dropout: float = 0.5,
    x: int = 0, out: int | None = None, stride: int | None = None,
) -> None:  # fmt: skip
    into = None if out is None else rows(N, K, dtype, out)
    launch.drop(rows(N, K, dtype, x, stride), SEED, dropout, into)


def by_expand(
    N: int = 32, R: int = 16, dtype: torch.dtype = BF16, low: torch.dtype = BF16,
    s: int = 0, stride: int | None = None, outs: tuple[int, ...] = (48,),
) -> None:  # fmt: skip
    S = rows(N, R, dtype, s, stride)
    ys, Bs = [rows(N, out, dtype) for out in outs], [rows(out, 5, low) for out in outs]
    launch.expand(ys, S, [0] * len(outs), Bs, [1.0] * len(outs))


@pytest.mark.parametrize(
    ("call", "alike", "apart"),
    [
        (
            by_shrink,
            [{"N": 48}, {"x": 8}, {"a": 24}, {"stride": 128}],
            [{"N": 33}, {"N": 1}, {"K": 72}, {"stride": 72}, {"R": 40}, {"x": 1}, {"a": 4}],
        ),
        (by_shrink, [], [{"dtype": torch.float16}, {"dropout": 0.3}, {"dropout": 0.5}]),
        (
            by_drop,
            [{"N": 48}, {"x": 8}, {"stride": 128}, {"dropout": 0.25}],
            [{"N": 33}, {"N": 1}, {"K": 72}, {"stride": 72}, {"x": 1}, {"dropout": 0.3}],
        ),
        (by_drop, [], [{"dtype": torch.float16}, {"out": 0}, {"out": 1}]),
        (
            by_expand,
            [{"N": 48}, {"s": 8}, {"stride": 32}, {"outs": (16, 32)}],
            [{"N": 33}, {"N": 1}, {"stride": 24}, {"s": 1}, {"outs": (40,)}],
        ),
        (by_expand, [], [{"dtype": torch.float16}, {"low": FP32}]),
    ],
)
def test_one_key_for_what_triton_compiles_once(
    call: Any, alike: list[dict], apart: list[dict], launches: list[Launch]
) -> None:
    """Triton compiles anew for other dtypes, alignments, and multiples of 16 or ones."""

    def key(**changed: Any) -> tuple[Any, ...]:
        launches.clear()
        call(**changed)
        (made,) = launches
        return made.key, tuple(made.constants.items())

    plain = key()
    for changed in alike:
        assert key(**changed) == plain, changed
    keys = [plain, *[key(**changed) for changed in apart]]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("call", "of"), [(by_shrink, "x"), (by_drop, "x"), (by_expand, "s")])
def test_a_key_knows_which_pointers_start_at_16_bytes(
    call: Any, of: str, launches: list[Launch]
) -> None:
    keys: dict[bool, set[Any]] = {True: set(), False: set()}
    for offset in range(0, 17 * 8, 4):
        launches.clear()
        call(**{of: offset})
        keys[offset % 8 == 0].add(launches[0].key)
    assert len(keys[True]) == len(keys[False]) == 1 and keys[True] != keys[False]


@pytest.mark.parametrize(
    ("R", "block"),
    [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, 64), (200, 64)],
)
def test_shrink_takes_as_few_columns_as_the_rank(
    R: int, block: int, launches: list[Launch]
) -> None:
    by_shrink(N=37, R=R)
    assert launches[0].constants["BLOCK_R"] == block
    assert launches[0].grid == (cdiv(37, launch.SHRINK["BLOCK_M"]), cdiv(R, block))


@pytest.mark.parametrize(("K", "even"), [(64, False), (128, True), (129, False), (256, True)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_shrink_is_told(K: int, even: bool, dropout: float, launches: list[Launch]) -> None:
    for dtype, precision in ((FP32, "ieee"), (BF16, "tf32")):
        by_shrink(K=K, dtype=dtype, dropout=dropout, stride=320)
        said = launches[-1].constants
        assert (said["EVEN_K"], said["DROPOUT"], said["PRECISION"]) == (
            even,
            dropout > 0,
            precision,
        )
        assert {*launch.SHRINK} < {*said}
        assert launches[-1].arguments[4:] == (32, K, 16, 320, threshold(dropout))


def test_nothing_is_launched_for_nothing(launches: list[Launch]) -> None:
    assert launch.shrink(rows(0, 64), rows(16, 64), None, 0.0).shape == (0, 16)
    assert launch.shrink(rows(5, 64), rows(0, 64), None, 0.0).shape == (5, 0)
    assert launch.drop(rows(0, 64), SEED, 0.5).shape == (0, 64)
    by_expand(N=0, outs=(48, 16, 16, 16, 16))
    assert not launches


@pytest.mark.parametrize("offset", [0, 1])
def test_rows_that_are_in_order_are_not_copied(offset: int, launches: list[Launch]) -> None:
    X = rows(9, 40, offset=offset, stride=64)
    columns = torch.randn(40, 9).bfloat16().t()
    for given, same in ((X, True), (columns, False), (X[:, ::2], False), (X[:1], True)):
        launch.drop(given, SEED, 0.5)
        launch.shrink(given, rows(16, given.shape[1]), None, 0.0)
        for made in launches[-2:]:
            taken = made.arguments[0]
            assert (taken.data_ptr() == given.data_ptr()) == same and taken.stride(1) == 1
            assert torch.equal(taken, given)


@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 9])
def test_four_modules_a_launch(M: int, launches: list[Launch]) -> None:
    N, ranks, outs = 200, [3, 40, 16, 24, 1, 8, 17, 5, 3][:M], [300, 64, 7, 128, 33, 16, 8, 90, 129]
    ys, Bs = [rows(N, out) for out in outs[:M]], [rows(outs[m], ranks[m]) for m in range(M)]
    first = [sum(map(launch.padded, ranks[:m])) for m in range(M)]
    S, scalings = rows(N, sum(map(launch.padded, ranks))), [0.5 + m for m in range(M)]
    launch.expand(ys, S, first, Bs, scalings)
    assert len(launches) == cdiv(M, 4)
    for i, made in enumerate(launches):
        some = range(4 * i, min(4 * i + 4, M))
        s, *tensors, factors, table, rows_, stride = made.arguments
        assert s is S and (rows_, stride) == (N, S.stride(0)) and len(tensors) == 8
        for given, taken in ((ys, tensors[:4]), (Bs, tensors[4:])):
            there = [given[m].data_ptr() for m in some]
            assert [t.data_ptr() for t in taken] == there + there[:1] * (4 - len(some))
        assert factors.tolist() == [scalings[m] for m in some]
        tiles = [
            [slot, first[m], ranks[m], launch.padded(ranks[m]), column, outs[m]]
            for slot, m in enumerate(some)
            for column in range(0, outs[m], 128)
        ]
        assert table.tolist() == [[*tile, 0, 0] for tile in tiles] and table.is_contiguous()
        assert made.grid == (2, len(tiles))
        assert made.constants["ALIGNED"] == all(outs[m] % 16 == 0 for m in some)
        assert made.constants["PRECISION"] == "tf32" and {*launch.EXPAND} < {*made.constants}


@pytest.mark.parametrize("major", [8, 9, 10, 12])
def test_ragged_rows_have_a_smaller_tile_on_blackwell(
    major: int, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    asked = launch._is_blackwell.__wrapped__
    assert asked(torch.device("cuda", 0)) == (major >= 10) and not asked(torch.device("cpu"))
    monkeypatch.setattr(launch, "_is_blackwell", lambda device: major >= 10)
    for outs in ((48, 32), (48, 33)):
        by_expand(N=130, outs=outs)
        smaller = outs[1] == 33 and major >= 10
        assert launches[-1].constants["BLOCK_M"] == (64 if smaller else 128)
        assert launches[-1].grid[0] == (3 if smaller else 2)


def test_the_width_of_a_segment() -> None:
    assert [launch.padded(rank) for rank in (0, 1, 15, 16, 17, 64)] == [0, 16, 16, 16, 32, 64]


def test_factors_start_at_16_bytes_in_one_dtype(launches: list[Launch]) -> None:
    transposed, S, y = torch.randn(5, 48).bfloat16().t(), rows(32, 16), rows(32, 48)
    given = [rows(48, 5, offset=8 * i) for i in range(18)]
    given += [
        rows(48, 5, FP32, offset=16),
        rows(48, 5, offset=1),
        rows(48, 5, offset=4),
        transposed,
    ]
    for B in given:
        launch.expand([y], S, [0], [B], [1.0])
        taken = launches[-1].arguments[5]
        assert taken.data_ptr() % 16 == 0 and taken.is_contiguous() and torch.equal(taken, B)
        as_given = B.is_contiguous() and B.data_ptr() % 16 == 0
        assert (taken.data_ptr() == B.data_ptr()) == as_given and taken.dtype == B.dtype
    mixed = [rows(48, 5, FP32), rows(48, 5), rows(48, 5, FP32)]
    launch.expand([y, y, y], S, [0] * 3, mixed, [1.0] * 3)
    for B, taken in zip(mixed, launches[-1].arguments[5:8], strict=True):
        assert taken.dtype == BF16 and torch.equal(taken, B.bfloat16())


def test_products_between_16_bytes_are_added_by_torch(launches: list[Launch]) -> None:
    S, Bs = rows(7, 48, FP32), [rows(20, 3, FP32), rows(12, 17).to(BF16)]
    for offsets in ((1, 0), (0, 2), (4, 8)):
        launches.clear()
        ys = [rows(7, 20, FP32, offsets[0]), rows(7, 12, FP32, offsets[1])]
        wanted = [
            y + scaling * S[:, first : first + B.shape[1]] @ B.float().t()
            for y, scaling, first, B in zip(ys, (0.5, 2.0), (0, 16), Bs, strict=True)
        ]
        launch.expand([ys[0], ys[1].view(7, 3, 4)], S, [0, 16], Bs, [0.5, 2.0])
        aligned = offsets == (4, 8)
        assert len(launches) == int(aligned)
        if not aligned:
            for y, right in zip(ys, wanted, strict=True):
                torch.testing.assert_close(y, right)


@pytest.mark.parametrize(
    ("x", "aligned"),
    [
        (torch.zeros(3, 64), True),
        (torch.zeros(2, 3, 16), True),
        (torch.zeros(3, 40), False),
        (torch.zeros(3, 17), False),
        (torch.zeros(3, 15), False),
        (torch.zeros(16, 3), False),
        (torch.zeros(3, 64)[:, :32], True),  # rows 64 apart
        (torch.zeros(3, 72)[:, :64], False),  # 72 apart
        (torch.zeros(2, 5, 96)[:, :2, :64], True),
        (torch.zeros(2, 6, 72)[:, :, :64], False),
        (torch.zeros(3, 72)[:1, :64], True),  # one row
        (torch.zeros(2, 5 * 16 + 8)[:, :80].unflatten(1, (5, 16)), False),
        (torch.zeros(3, 130)[:, ::2][:, :64], True),  # copied, as its columns are apart
        (torch.zeros(64, 3).t(), True),
    ],
)
def test_whose_rows_start_at_16_elements(x: Tensor, aligned: bool) -> None:
    assert launch.rows_aligned(x) is aligned


def test_which_kernels_take_which_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from adarank_kernels.lora.backends import triton

    monkeypatch.setattr(triton, "ready_among", lambda names, *_: frozenset(names))
    assert triton.kernels(torch.zeros(3, 64)) == {"lora_shrink", "lora_expand", "lora_drop"}
    assert triton.kernels(torch.zeros(3, 40)) == {"lora_expand", "lora_drop"}
