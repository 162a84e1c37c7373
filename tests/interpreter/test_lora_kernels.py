"""The Triton kernels of the LoRA ops under the interpreter, against float64 and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adarank_kernels import grouped_lora_linear, grouped_lora_linear_ref
from adarank_kernels.lora import group as groups
from adarank_kernels.lora import triton_launch as launch
from adarank_kernels.lora.backends import triton
from adarank_kernels.lora.dropout import keep_mask
from adarank_kernels.runtime import native, registry
from adarank_kernels.runtime.registry import check_close
from tests.kernels.lora_cases import assert_as_good_as_torch, make_group

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS, OUTS = (0, 1, 3, 8, 24, 64), (40, 7, 129, 33, 64, 200)


def guarded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers inside a buffer of NaN: reading past an edge shows."""
    rows, columns = tensor.shape
    buffer = torch.full((rows + 2, columns), float("nan"), dtype=dtype)
    buffer[1:-1] = tensor
    return buffer[1:-1]


def randn(*size: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(*size, generator=generator).mul(scale).bfloat16().float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "K", "R"), [(150, 200, 48), (1, 64, 16), (130, 72, 144), (3, 256, 7)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_shrink(dtype: torch.dtype, N: int, K: int, R: int, dropout: float) -> None:
    X, A = guarded(randn(N, K), dtype), guarded(randn(R, K, scale=K**-0.5), dtype)
    seed = torch.tensor([2**62 + 99]) if dropout else None
    kept = X * keep_mask(seed, N, K, dropout) if seed is not None else X
    exact = kept.double() @ A.double().t()
    S = launch.shrink(X, A, seed, dropout)
    check_close(S, kept @ A.t(), exact)
    assert torch.equal(S, launch.shrink(X, A, seed, dropout))
    columns_first = X.t().contiguous().t()
    assert torch.equal(S, launch.shrink(columns_first, A, seed, dropout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", [None, torch.float32])
@pytest.mark.parametrize("N", [1, 131])
def test_expand(dtype: torch.dtype, adapters: torch.dtype | None, N: int) -> None:
    used = [(r, out) for r, out in zip(RANKS, OUTS, strict=True) if r]
    offsets, total = [], 0
    for rank, _ in used:
        offsets.append(total)
        total += launch.padded(rank)
    S = guarded(randn(N, total), dtype)
    for (rank, _), offset in zip(used, offsets, strict=True):
        S[:, offset + rank : offset + launch.padded(rank)] = torch.nan  # padding is not read
    Bs = [randn(out, rank, scale=rank**-0.5).to(adapters or dtype) for rank, out in used]
    Ys = [randn(N, out).to(dtype) for _, out in used]
    scalings = [0.5, 1.0, 2.0, 1.5, 0.75]
    ours = [Y.clone() for Y in Ys]
    launch.expand(ours, S, offsets, Bs, scalings)
    for y, Y, B, s, offset in zip(ours, Ys, Bs, scalings, offsets, strict=True):
        part, low = S[:, offset : offset + B.shape[1]], B.to(dtype)
        exact = Y.double() + s * (part.double() @ B.double().t())
        check_close(y, Y + s * (part @ low.t()), exact)


def test_expand_tiles_skip_rank_zero() -> None:
    tiles = launch.expand_tiles([0, 0, 16], [0, 3, 17], [300, 130, 128], 128)
    assert tiles == ((1, 0, 3, 16, 0, 130), (1, 0, 3, 16, 128, 130), (2, 16, 17, 32, 0, 128))


@pytest.mark.parametrize("dtype", DTYPES)
def test_drop_draws_the_bits_of_torch(dtype: torch.dtype) -> None:
    X, seed = guarded(randn(40, 333), dtype), torch.tensor([-(2**60) - 17])
    expected = X * keep_mask(seed, 40, 333, 0.4)
    assert torch.equal(launch.drop(X, seed, 0.4), expected)
    added = launch.drop(X, seed, 0.4, X.clone())
    assert torch.equal(added, X + expected)


@pytest.mark.parametrize("name", ["shrink", "expand", "drop"])
def test_self_checks_pass(name: str) -> None:
    registry._checks[f"lora_{name}"](torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_op_through_the_kernels(dtype: torch.dtype, dropout: float) -> None:
    group = make_group((2, 70), train_base=True, dropout=dropout, seed=torch.tensor([41]))
    exact = group.results(grouped_lora_linear_ref)  # float64
    torchs = group.to(dtype).results(grouped_lora_linear_ref)
    ours = group.to(dtype).results(grouped_lora_linear)
    again = group.to(dtype).results(grouped_lora_linear)
    assert_as_good_as_torch(ours, torchs, exact)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("left", ["shrink", "expand", "drop"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_kernel_alone(left: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others failed their checks on this device: torch's products take their places."""
    chosen = frozenset({f"lora_{left}"})
    monkeypatch.setattr(triton, "ready_among", lambda names, *_: chosen & {*names})
    group = make_group((2, 35), train_base=True, dropout=dropout, seed=torch.tensor([7]))
    exact = group.results(grouped_lora_linear_ref)
    torchs = group.to(torch.bfloat16).results(grouped_lora_linear_ref)
    assert_as_good_as_torch(group.to(torch.bfloat16).results(grouped_lora_linear), torchs, exact)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [(3,), (3, 0, 8)])
def test_outputs_may_be_changed_in_place(bias: bool, ranks: tuple[int, ...]) -> None:
    x = torch.randn(2, 5, 16, requires_grad=True)
    weights = [torch.randn(24, 16) for _ in ranks]
    biases = [torch.randn(24) if bias else None for _ in ranks]
    As = [torch.randn(r, 16, requires_grad=True) if r else None for r in ranks]
    Bs = [torch.randn(24, r, requires_grad=True) if r else None for r in ranks]
    for y in grouped_lora_linear(x, weights, As, Bs, [1.0] * len(ranks), biases):
        y.relu_()


def test_op_through_the_kernels_with_float32_adapters_and_foreign_base() -> None:
    group = make_group((33,), bias=False)
    exact = group.results(grouped_lora_linear_ref)
    torchs = group.to(torch.bfloat16, torch.float32).results(grouped_lora_linear_ref)

    def op(x: Tensor, weights: list, lora_As: list, lora_Bs: list, s: list, _: list) -> list:
        bases = [torch.nn.functional.linear(x, weight) for weight in weights]
        return grouped_lora_linear(x, None, lora_As, lora_Bs, s, base_outputs=bases)

    ours = group.to(torch.bfloat16, torch.float32).results(op)
    assert_as_good_as_torch(ours, torchs, exact)


@pytest.mark.parametrize("used", [[2], [1, 5], [0]])
def test_only_some_outputs_and_gradients(used: list[int]) -> None:
    group = make_group((40,)).to(torch.float32)
    leaves = [group.x, group.lora_As[2], group.lora_Bs[5]]

    def grads(op: object) -> tuple:
        outputs = group.run(op)
        chosen, dYs = [outputs[m] for m in used], [group.dYs[m] for m in used]
        return torch.autograd.grad(chosen, leaves, dYs, allow_unused=True)

    for ours, refs in zip(grads(grouped_lora_linear), grads(grouped_lora_linear_ref), strict=True):
        assert (ours is None) == (refs is None)
        if refs is not None:
            torch.testing.assert_close(ours, refs, atol=1e-5, rtol=1e-5)


# Whole passes as on a GPU: base products in C++, kernels launched around them. float16 and float64
# have no C++ products on the CPU, so that the passes take the same branches.


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    if native.operators() is None:
        pytest.skip("no C++ compiler")
    made = groups.Group.__init__

    def make(group: groups.Group, *arguments: Any) -> None:
        made(group, *arguments)
        group.device_type = "cuda"

    monkeypatch.setattr(groups.Group, "__init__", make)
    monkeypatch.setattr(groups.Group, "_whole_backend", lambda group, x: True)
    monkeypatch.setattr(groups, "choose_backend", lambda x, factors: triton)
    return monkeypatch


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(40,), (2, 3, 7), (0,)])
def test_whole_passes_as_on_a_gpu(
    on_a_gpu: pytest.MonkeyPatch, dtype: torch.dtype, dropout: float, shape: tuple[int, ...]
) -> None:
    group = make_group(shape, dropout=dropout, seed=torch.tensor([41]))
    exact = group.results(grouped_lora_linear_ref)
    torchs = group.to(dtype).results(grouped_lora_linear_ref)
    ours = group.to(dtype).results(grouped_lora_linear)
    again = group.to(dtype).results(grouped_lora_linear)
    assert_as_good_as_torch(ours, torchs, exact)
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    outputs = group.to(dtype).run(grouped_lora_linear)
    assert {type(y.grad_fn).__name__ for y in outputs} == {
        "DroppedBackward" if dropout else "CppFunction"
    }
    with torch.no_grad():
        outputs = group.to(dtype).run(grouped_lora_linear)
    assert all(torch.equal(y, ours[f"y[{m}]"]) for m, y in enumerate(outputs))


@pytest.mark.parametrize("left", ["shrink", "expand", "drop"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_whole_passes_with_one_kernel(
    on_a_gpu: pytest.MonkeyPatch, left: str, dropout: float
) -> None:
    chosen = frozenset({f"lora_{left}"})
    on_a_gpu.setattr(triton, "ready_among", lambda names, *_: chosen & {*names})
    group = make_group((2, 35), dropout=dropout, seed=torch.tensor([7]))
    exact = group.results(grouped_lora_linear_ref)
    torchs = group.to(torch.float16, torch.float32).results(grouped_lora_linear_ref)
    ours = group.to(torch.float16, torch.float32).results(grouped_lora_linear)
    assert_as_good_as_torch(ours, torchs, exact)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "wanted", [["x"], ["lora_As[1]", "lora_As[5]"], ["lora_Bs[2]"], ["x", "lora_Bs[5]"], []]
)
def test_whole_passes_for_some_gradients(
    on_a_gpu: pytest.MonkeyPatch, wanted: list[str], dropout: float
) -> None:
    group = make_group((21,), dropout=dropout, seed=torch.tensor([7]))
    for name, leaf in group.leaves().items():
        leaf.requires_grad_(name in wanted)
    exact = group.results(grouped_lora_linear_ref)
    torchs = group.to(torch.float16).results(grouped_lora_linear_ref)
    ours = group.to(torch.float16).results(grouped_lora_linear)
    assert_as_good_as_torch(ours, torchs, exact)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("used", [[2], [1, 5], [0]])
def test_whole_passes_for_some_outputs(
    on_a_gpu: pytest.MonkeyPatch, used: list[int], dropout: float
) -> None:
    group = make_group((40,), dropout=dropout, seed=torch.tensor([7]))
    leaves = list(group.leaves().values())

    def grads(op: object) -> tuple:
        outputs = group.run(op)
        chosen, dYs = [outputs[m] for m in used], [group.dYs[m] for m in used]
        return torch.autograd.grad(chosen, leaves, dYs, allow_unused=True)

    for ours, refs in zip(grads(grouped_lora_linear), grads(grouped_lora_linear_ref), strict=True):
        assert (ours is None) == (refs is None)
        if refs is not None:
            torch.testing.assert_close(ours, refs)
