"""The C++ operators one by one: schemas, versions, bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from adarank_kernels.lora.backends import cpu
from adarank_kernels.lora.backends import torch as aten
from adarank_kernels.lora.group import choose_backend
from tests.kernels.product_cases import (
    DTYPES,
    NAMES,
    SEED,
    dtypes,
    layout,
    low_rank,
    needs_operators,
    ops,
    poisoned_outputs,
    randn,
)

__all__ = ["dtypes", "poisoned_outputs"]  # fixtures
pytestmark = needs_operators


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
            *([Y, Y], X, S, None, parts, [0.5, 2.0], 0.3, SEED, 1, None, True, 3, 3, [9, 20], None),
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
    yield "group_backward", 14, randn(9, 13).to(dtype)
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


def test_which_factors_the_operators_take() -> None:
    x = torch.zeros(2, 8)
    assert choose_backend(x, [None, x]) is choose_backend(x, []) is cpu
    assert choose_backend(x, [x, x.half()]) is choose_backend(x, [x, x.bfloat16()]) is aten
    assert choose_backend(x.half(), [None]) is choose_backend(x.double(), [x]) is aten


def test_bfloat16_rows_take_factors_of_both_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, low = dtypes
    x = torch.zeros(2, 8, dtype=dtype)
    assert choose_backend(x, [x.to(low), None, x.float()]) is cpu
    assert [cpu.padded(rank, dtype) - rank for rank in (1, 2, 7)] == (
        [1, 0, 1] if dtype == torch.bfloat16 else [0, 0, 0]
    )
