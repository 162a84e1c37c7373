"""Triton kernels on the CPU: `TRITON_INTERPRET=1 pytest tests/interpreter`, a process of its own.

The interpreter stores bfloat16 as uint16 and computes on those integers (wrong in triton 3.6 to
3.9), so `repair_bfloat16` replaces the operations that touch it: operands widen to float32, results
round to nearest, ties to even.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float -> bfloat16 bits, to nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def repair_bfloat16() -> None:
    """Make the interpreter's bfloat16 casts, elementwise operations and dot right."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, to_float, binary, unary, dot = (
        builder.cast_impl,
        builder.create_fp_to_fp,
        builder.binary_op,
        builder.unary_op,
        builder.create_dot,
    )

    def is_bfloat16(value) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def cast_impl(self, src, dst_type):
        to = dst_type.scalar
        if is_bfloat16(src) and to != tl.bfloat16:
            return handle(widen(src.data).astype(interpreter._get_np_dtype(dst_type)), to)
        if to == tl.bfloat16 and not is_bfloat16(src):
            return handle(narrow(src.data), to)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if is_bfloat16(src) or dst_type.scalar == tl.bfloat16:
            return cast_impl(self, src, dst_type)
        return to_float(self, src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if not (is_bfloat16(lhs) and is_bfloat16(rhs)):
            return binary(self, lhs, rhs, op)
        result = op(widen(lhs.data), widen(rhs.data))
        if result.dtype == np.bool_:
            return handle(result, tl.int1)
        return handle(narrow(result), tl.bfloat16)

    def unary_op(self, arg, op):
        if not is_bfloat16(arg):
            return unary(self, arg, op)
        return handle(narrow(op(widen(arg.data))), tl.bfloat16)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (handle(widen(t.data), tl.float32) if is_bfloat16(t) else t for t in (a, b))
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.binary_op, builder.unary_op, builder.create_dot = binary_op, unary_op, create_dot


def check_hints() -> None:
    """Make `tl.multiple_of` raise where it is not so: a compiled kernel would read elsewhere."""
    from triton.runtime import interpreter

    handle = interpreter.TensorHandle
    set_attr = handle.set_attr

    def checked(self, key, value):
        if key == "tt.divisibility":
            for number in value:
                if number & (number - 1) or (self.data % number).any():
                    raise ValueError(f"{self.data}: no multiple of {number}, or no power of 2")
        set_attr(self, key, value)

    handle.set_attr = checked


if INTERPRETED:
    repair_bfloat16()
    check_hints()

AROUND = 64  # elements before and after


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that a kernel should have written is NaN until it does; around it NaN stays."""
    import torch

    empty, new_empty = torch.empty, torch.Tensor.new_empty
    made: list[tuple[torch.Tensor, int]] = []

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.device.type != "cpu":
            return tensor
        if not tensor.is_contiguous() or tensor.requires_grad:
            return tensor.fill_(float("nan"))
        size = tensor.numel()
        larger = empty(size + 2 * AROUND, dtype=tensor.dtype, device=tensor.device)
        made.append((larger.fill_(float("nan")), size))
        with torch.no_grad():
            return tensor.set_(larger.untyped_storage(), AROUND, tensor.shape)  # no view

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    yield
    for larger, size in made:
        assert larger[:AROUND].isnan().all() and larger[AROUND + size :].isnan().all()
