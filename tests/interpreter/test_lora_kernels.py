"""The Triton kernels of the LoRA ops under the interpreter, against float64 and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adarank_kernels import grouped_lora_linear, grouped_lora_linear_ref
from adarank_kernels.lora import group as groups
from adarank_kernels.lora import node
from adarank_kernels.lora import triton_gradients_launch as gradients
from adarank_kernels.lora import triton_launch as launch
from adarank_kernels.lora.backends import triton
from adarank_kernels.lora.backends.torch import scaled_mm
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
    offsets, S = low_rank(N, used, dtype)  # padding is not read
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


def low_rank(N: int, used: list[tuple[int, int]], dtype: torch.dtype) -> tuple[list[int], Tensor]:
    """First columns of S or dS [N, width], and one with NaN in its padding."""
    offsets, total = [], 0
    for rank, _ in used:
        offsets.append(total)
        total += launch.padded(rank)
    S = guarded(randn(N, total), dtype)
    for (rank, _), offset in zip(used, offsets, strict=True):
        S[:, offset + rank : offset + launch.padded(rank)] = torch.nan
    return offsets, S


def gradients_of(N: int, dtype: torch.dtype) -> list[Tensor]:
    """One for each output; guarded, every second with its columns amid others'."""
    plain = [guarded(randn(N, out), dtype) for _, out in USED]
    return [
        guarded(torch.cat([dY, dY], 1), dtype)[:, dY.shape[1] :] if m % 2 else dY
        for m, dY in enumerate(plain)
    ]


USED = [(r, out) for r, out in zip(RANKS, (48, 16, 144, 336, 640, 208), strict=True) if r]
SCALINGS = [0.5, 1.0, 2.0, 1.5, 0.75]
ADAPTERS = [*((dtype, None) for dtype in DTYPES), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("dtype", "adapters"), ADAPTERS)
@pytest.mark.parametrize("N", [1, 300])
def test_grad_s(dtype: torch.dtype, adapters: torch.dtype | None, N: int) -> None:
    offsets, S = low_rank(N, USED, dtype)
    Bs = [randn(out, rank, scale=rank**-0.5).to(adapters or dtype) for rank, out in USED]
    dYs = gradients_of(N, dtype)
    dS = gradients.grad_s(dYs, Bs, SCALINGS, offsets, S.shape[1])
    assert dS.isfinite().all() and dS.dtype == dtype
    dS_again = gradients.grad_s(dYs, Bs, SCALINGS, offsets, S.shape[1])
    assert torch.equal(dS, dS_again)
    for dY, B, s, offset in zip(dYs, Bs, SCALINGS, offsets, strict=True):
        end, low = offset + B.shape[1], B.to(dtype)
        check_close(dS[:, offset:end], scaled_mm(dY, low, s), s * (dY.double() @ low.double()))
        assert not dS[:, end : offset + launch.padded(B.shape[1])].any()


@pytest.mark.parametrize(("dtype", "adapters"), ADAPTERS)
@pytest.mark.parametrize("N", [1, 900])
def test_grad_b(dtype: torch.dtype, adapters: torch.dtype | None, N: int) -> None:
    offsets, S = low_rank(N, USED, dtype)
    ranks, dYs = [rank for rank, _ in USED], gradients_of(N, dtype)
    given = dYs, S, offsets, ranks, SCALINGS, adapters or dtype
    found = gradients.grad_b(*given)
    for dB, again in zip(found, gradients.grad_b(*given), strict=True):
        assert torch.equal(dB, again) and dB.dtype == (adapters or dtype)
    for dY, dB, rank, s, offset in zip(dYs, found, ranks, SCALINGS, offsets, strict=True):
        part = S[:, offset : offset + rank]
        exact = s * (dY.double().t() @ part.double())
        check_close(dB, scaled_mm(dY.t(), part, s), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K", "width"), [(1, 64, 16), (300, 80, 144), (700, 208, 48)])
def test_grad_a_draws_the_mask(dtype: torch.dtype, N: int, K: int, width: int) -> None:
    seed = torch.tensor([2**62 + 99])
    X, dS = guarded(randn(N, K), dtype), guarded(randn(N, width), dtype)
    kept = X * keep_mask(seed, N, K, 0.3)
    dA = gradients.grad_a(dS, X, seed, 0.3, dtype)
    check_close(dA, dS.t() @ kept, dS.double().t() @ kept.double())
    columns_first = X.t().contiguous().t()
    assert torch.equal(dA, gradients.grad_a(dS, columns_first, seed, 0.3, dtype))


def test_products_without_rows_are_zero() -> None:
    dYs, S = [torch.empty(0, 32)], torch.empty(0, 16)
    assert gradients.grad_s(dYs, [torch.ones(32, 3)], [1.0], [0], 16).shape == (0, 16)
    (dB,) = gradients.grad_b(dYs, S, [0], [3], [1.0], torch.float32)
    assert torch.equal(dB, torch.zeros(32, 3))
    dA = gradients.grad_a(S, torch.empty(0, 32), torch.tensor([1]), 0.3, torch.float32)
    assert torch.equal(dA, torch.zeros(16, 32))


@pytest.mark.parametrize("rows", [1, 4096, 16384])
@pytest.mark.parametrize(("columns", "width"), [(28672, 32), (6144, 192), (4096, 48), (192, 64)])
def test_shares_take_at_most_a_quarter_of_dy(
    rows: int, columns: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def launch(kernel: object, key: object, grid: object, given: tuple, constants: object) -> None:
        taken.append(given)

    monkeypatch.setattr(gradients, "launch", launch)
    dY, S = (torch.empty(rows, 1, dtype=torch.bfloat16).expand(rows, n) for n in (columns, width))
    monkeypatch.setattr(gradients, "_readable", lambda matrix: matrix)
    B = torch.empty(columns, width, dtype=torch.bfloat16)
    gradients.grad_s([dY], [B], [1.0], [0], width)
    gradients.grad_b([dY], S, [0], [width], [1.0], torch.float32)
    for given in taken:
        shares = given[0]
        assert shares.dim() < 3 or 4 * 4 * shares.numel() <= 2 * rows * columns


@pytest.mark.parametrize("name", ["shrink", "expand", "drop", "grad_s", "grad_b", "grad_a"])
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


KERNELS = ["shrink", "expand", "drop", "grad_s", "grad_b", "grad_a"]
ALIGNED = (48, 16, 96, 32, 64, 128)  # outputs that the kernels of the backward pass take


@pytest.mark.parametrize("left", KERNELS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_kernel_alone(left: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others failed their checks on this device: torch's products take their places."""
    chosen = frozenset({f"lora_{left}"})
    monkeypatch.setattr(triton, "ready_among", lambda names, *_: chosen & {*names})
    group = make_group(
        (2, 35), outs=ALIGNED, train_base=True, dropout=dropout, seed=torch.tensor([7])
    )
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
    many(monkeypatch)
    return monkeypatch


def many(monkeypatch: pytest.MonkeyPatch, bound: int = 0) -> None:
    """Inputs of more numbers are many, for which the kernels are."""
    for module in (groups, node):
        monkeypatch.setattr(module, "HOST_BOUND", bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("bound", "dropout"),
    [(0, 0.0), (0, 0.3), (groups.HOST_BOUND, 0.0)],
    ids=["many", "dropout", "few"],
)
@pytest.mark.parametrize("shape", [(40,), (2, 3, 7), (0,)])
def test_whole_passes_as_on_a_gpu(
    on_a_gpu: pytest.MonkeyPatch,
    bound: int,
    dtype: torch.dtype,
    dropout: float,
    shape: tuple[int, ...],
) -> None:
    many(on_a_gpu, bound)
    group = make_group(shape, outs=ALIGNED, dropout=dropout, seed=torch.tensor([41]))
    exact = group.results(grouped_lora_linear_ref)
    torchs = group.to(dtype).results(grouped_lora_linear_ref)
    ours = group.to(dtype).results(grouped_lora_linear)
    again = group.to(dtype).results(grouped_lora_linear)
    assert_as_good_as_torch(ours, torchs, exact)
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    outputs = group.to(dtype).run(grouped_lora_linear)
    launched = dtype == torch.float16 and not bound and group.x.numel()
    assert {type(y.grad_fn).__name__ for y in outputs} == {
        "LaunchedBackward" if dropout or launched else "CppFunction"
    }
    with torch.no_grad():
        outputs = group.to(dtype).run(grouped_lora_linear)
    assert all(torch.equal(y, ours[f"y[{m}]"]) for m, y in enumerate(outputs))


@pytest.mark.parametrize("left", KERNELS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_whole_passes_with_one_kernel(
    on_a_gpu: pytest.MonkeyPatch, left: str, dropout: float
) -> None:
    chosen = frozenset({f"lora_{left}"})
    on_a_gpu.setattr(triton, "ready_among", lambda names, *_: chosen & {*names})
    group = make_group((2, 35), outs=ALIGNED, dropout=dropout, seed=torch.tensor([7]))
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
    group = make_group((21,), outs=ALIGNED, dropout=dropout, seed=torch.tensor([7]))
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
    group = make_group((40,), outs=ALIGNED, dropout=dropout, seed=torch.tensor([7]))
    leaves = list(group.leaves().values())

    def grads(op: object) -> tuple:
        outputs = group.run(op)
        chosen, dYs = [outputs[m] for m in used], [group.dYs[m] for m in used]
        return torch.autograd.grad(chosen, leaves, dYs, allow_unused=True)

    for ours, refs in zip(grads(grouped_lora_linear), grads(grouped_lora_linear_ref), strict=True):
        assert (ours is None) == (refs is None)
        if refs is not None:
            torch.testing.assert_close(ours, refs)
