"""grouped_lora_linear and lora_linear on the CPU: values, every gradient, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adarank_kernels import (
    grouped_lora_linear,
    grouped_lora_linear_ref,
    lora_linear,
    lora_linear_ref,
)
from adarank_kernels.lora.dropout import draw_seed, keep_mask, keep_scale
from tests.kernels.lora_cases import Group, assert_as_good_as_torch, make_group

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


pytestmark = pytest.mark.usefixtures("products")


def check(group: Group, dtype: torch.dtype, adapters: torch.dtype | None = None) -> None:
    exact = group.results(grouped_lora_linear_ref)
    torchs = group.to(dtype, adapters).results(grouped_lora_linear_ref)
    ours = group.to(dtype, adapters).results(grouped_lora_linear)
    assert_as_good_as_torch(ours, torchs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train_base", [False, True])
def test_values_and_gradients(dtype: torch.dtype, train_base: bool) -> None:
    check(make_group(train_base=train_base, bias=train_base), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 5), (2, 3, 67), (513,)])
def test_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(make_group(shape=shape), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_biases_of_a_frozen_base(products: str, dtype: torch.dtype) -> None:
    group = make_group()
    for bias in group.biases[1:]:
        bias.requires_grad_()
    check(group, dtype)
    if products == "whole":
        outputs = group.to(torch.float32).run(grouped_lora_linear)
        assert {type(y.grad_fn).__name__ for y in outputs} == {"CppFunction"}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_float32_adapters_on_a_bfloat16_base(dropout: float) -> None:
    kwargs = {"dropout": dropout, "seed": torch.tensor([3])} if dropout else {}
    group = make_group(**kwargs)
    check(group, torch.bfloat16, torch.float32)
    grads = group.to(torch.bfloat16, torch.float32).results(grouped_lora_linear)
    assert grads["dlora_As[1]"].dtype == grads["dlora_Bs[1]"].dtype == torch.float32
    assert grads["dx"].dtype == torch.bfloat16


@pytest.mark.parametrize("ranks", [(0, 0), (5, 0), (0, 33), (3, 7)])
def test_groups_of_two(ranks: tuple[int, int]) -> None:
    check(make_group(ranks=ranks, outs=(48, 20)), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_linear(dtype: torch.dtype) -> None:
    def single(op: Callable) -> Callable:
        return lambda x, W, A, B, s, b: [op(x, W[0], A[0], B[0], s[0], b[0])]

    group = make_group(ranks=(6,), outs=(50,), shape=(4, 9))
    exact = group.results(single(lora_linear_ref))
    torchs = group.to(dtype).results(single(lora_linear_ref))
    assert_as_good_as_torch(group.to(dtype).results(single(lora_linear)), torchs, exact)


def test_rank_zero_tensors_and_integer_scalings() -> None:
    group = make_group(ranks=(0, 4), outs=(8, 8))
    group.lora_As[0] = torch.zeros(0, 80, dtype=torch.float64, requires_grad=True)
    group.lora_Bs[0] = torch.zeros(8, 0, dtype=torch.float64, requires_grad=True)
    group.scalings = [2, 3]
    torch.testing.assert_close(group.run(grouped_lora_linear), group.run(grouped_lora_linear_ref))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_inputs(dtype: torch.dtype) -> None:
    group = make_group(shape=(6, 7), width=48, ranks=(3, 8), outs=(20, 36))
    group.x = group.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    group.weights = [w.t().contiguous().t() for w in group.weights]  # Conv1D: stored [in, out]
    group.lora_As = [a.detach().t().contiguous().t().requires_grad_() for a in group.lora_As]
    group.dYs = [g.transpose(0, 1).contiguous().transpose(0, 1) for g in group.dYs]
    assert not group.x.is_contiguous() and not group.to(dtype).weights[0].is_contiguous()
    check(group, dtype)
    group.x = torch.randn(48, 42, dtype=torch.float64).bfloat16().double().t().requires_grad_()
    group.dYs = [g.reshape(42, -1) for g in group.dYs]
    check(group, dtype)


def test_expanded_upstream_gradient() -> None:
    group = make_group(ranks=(3, 8), outs=(20, 36)).to(torch.float32)
    ours = torch.autograd.grad(sum(y.sum() for y in group.run(grouped_lora_linear)), group.x)
    refs = torch.autograd.grad(sum(y.sum() for y in group.run(grouped_lora_linear_ref)), group.x)
    torch.testing.assert_close(ours, refs)


NAMES = ["x", "lora_As[1]", "lora_As[2]", "lora_Bs[1]", "lora_Bs[3]", "weights[0]", "biases[2]"]


@pytest.mark.parametrize("wanted", [*([n] for n in NAMES), NAMES[1:3], NAMES[3:5], NAMES[:1], []])
def test_only_some_inputs_want_gradients(wanted: list[str]) -> None:
    group = make_group(train_base=True)
    for name, leaf in group.leaves().items():
        leaf.requires_grad_(name in wanted)
    assert sorted(group.leaves()) == sorted(wanted)
    check(group, torch.float32)


def test_frozen_inputs_get_no_gradient_and_cost_no_memory(products: str) -> None:
    group = make_group(shape=(64,), ranks=(3, 8), outs=(20, 36)).to(torch.float32)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        group.run(grouped_lora_linear)
    parameters = {t.data_ptr() for t in (*group.weights, *group.lora_As, *group.lora_Bs)}
    activations = [t for t in saved if t.data_ptr() not in parameters]
    shapes = {t.data_ptr(): tuple(t.shape) for t in activations}
    assert shapes.pop(group.x.data_ptr()) == (64, 80)  # X once, S
    assert list(shapes.values()) == ([(64, 3), (64, 8)] if products == "flat" else [(64, 11)])


def test_unused_outputs() -> None:
    group = make_group(shape=(12,)).to(torch.float32)
    leaves = list(group.leaves().values())
    for used in ([2], [0], [1, 4]):
        ours, refs = (
            torch.autograd.grad(
                [group.run(op)[m] for m in used]
                if op is grouped_lora_linear_ref
                else [ys[m] for ys in [group.run(op)] for m in used],
                leaves,
                [group.dYs[m] for m in used],
                allow_unused=True,
            )
            for op in (grouped_lora_linear, grouped_lora_linear_ref)
        )
        for our, ref in zip(ours, refs, strict=True):
            assert (our is None) == (ref is None)
            if ref is not None:
                torch.testing.assert_close(our, ref)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_second_backward_and_repeats_are_bit_identical(dropout: float) -> None:
    group = make_group(dropout=dropout, seed=torch.tensor([11])).to(torch.bfloat16)
    outputs, leaves = group.run(grouped_lora_linear), list(group.leaves().values())
    first = torch.autograd.grad(outputs, leaves, group.dYs, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, group.dYs)
    again = group.results(grouped_lora_linear)
    for a, b, c in zip(first, second, list(again.values())[len(outputs) :], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradcheck(dropout: float) -> None:
    kwargs = {"dropout": dropout, "seed": torch.tensor([5])} if dropout else {}
    group = make_group((3,), 6, (0, 1, 4), (5, 3, 6), train_base=True, **kwargs)
    names, leaves = list(group.leaves()), list(group.leaves().values())

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        for name, tensor in zip(names, tensors, strict=True):
            if name == "x":
                group.x = tensor
            else:
                attribute, _, index = name.partition("[")
                getattr(group, attribute)[int(index[:-1])] = tensor
        return tuple(group.run(grouped_lora_linear))

    assert torch.autograd.gradcheck(op, leaves)


def test_against_peft() -> None:
    """The reference against PEFT's own layer."""
    from peft import LoraConfig
    from peft.tuners import lora as peft_lora

    base = torch.nn.Linear(24, 40)
    config = LoraConfig(r=5, lora_alpha=10, init_lora_weights=False)
    layer = peft_lora.Linear(base, "default", config=config, r=5, lora_alpha=10)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(B)
    x = torch.randn(2, 7, 24)
    for op in (lora_linear_ref, lora_linear):
        y = op(x, base.weight, A, B, layer.scaling["default"], base.bias)
        torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grown", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_data_of_a_larger_rank(dtype: torch.dtype, grown: int) -> None:
    """`.data` may be replaced: a backward pass underway raises, the next call takes it."""
    group = make_group(ranks=(3, 8), outs=(20, 36)).to(dtype)
    outputs = group.run(grouped_lora_linear)
    other = make_group(ranks=(7, 80), outs=(20, 36)).to(dtype)
    group.lora_As[grown].data = other.lora_As[grown].data
    with pytest.raises((RuntimeError, ValueError)):
        group.run(grouped_lora_linear)  # lora_B is of the old rank
    group.lora_Bs[grown].data = other.lora_Bs[grown].data
    with pytest.raises(RuntimeError):
        torch.autograd.backward(outputs, group.dYs)
    # outputs alone: the graph underway keeps the old shape for the gradients of these leaves
    ours, torchs, exact = (
        {str(m): y.detach() for m, y in enumerate(outputs)}
        for outputs in (
            group.run(grouped_lora_linear),
            group.run(grouped_lora_linear_ref),
            group.to(torch.float64).run(grouped_lora_linear_ref),
        )
    )
    assert_as_good_as_torch(ours, torchs, exact)


# Base products made elsewhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["own", "view", "leaf", "transposed"])
def test_base_outputs(dtype: torch.dtype, kind: str) -> None:
    group = make_group(shape=(2, 9), ranks=(0, 3, 8), outs=(20, 36, 10), train_base=True)

    def op(x: Tensor, weights: list, *rest: object, **kwargs: object) -> list[Tensor]:
        bases = [torch.nn.functional.linear(x, w) for w in weights]
        if kind == "view":
            bases = [b.view(18, -1).view(b.shape) for b in bases]
        if kind == "transposed":
            bases = [torch.einsum("abi,oi->oab", x, w).permute(1, 2, 0) for w in weights]
        lora_As, lora_Bs, scalings, _ = rest
        return grouped_lora_linear(x, None, lora_As, lora_Bs, scalings, base_outputs=bases)  # type: ignore[arg-type]

    if kind == "leaf":
        leaves = [torch.randn(2, 9, 80, requires_grad=True) for _ in range(2)]
        A, B = torch.randn(3, 80), torch.randn(80, 3)
        before = [leaf.detach().clone() for leaf in leaves]
        y = lora_linear(leaves[0], None, A, B, 2.0, base_output=leaves[1])
        y.sum().backward()
        assert torch.equal(leaves[1].detach(), before[1])
        assert torch.equal(leaves[1].grad, torch.ones(2, 9, 80))  # type: ignore[arg-type]
        return
    group.biases = [None] * 3
    exact = group.results(grouped_lora_linear_ref)
    torchs = group.to(dtype).results(grouped_lora_linear_ref)
    assert_as_good_as_torch(group.to(dtype).results(op), torchs, exact)


def test_base_outputs_of_another_dtype_keep_it() -> None:
    x, A, B = torch.randn(5, 16).bfloat16(), torch.randn(3, 16), torch.randn(8, 3)
    base = torch.randn(5, 8)
    y = lora_linear(x, None, A, B, 2.0, base_output=base.clone())
    assert y.dtype == torch.float32
    exact = base.double() + 2 * (x.double() @ A.double().t() @ B.double().t())
    torchs = base + 2 * (x @ A.bfloat16().t() @ B.bfloat16().t())
    assert (y - exact).norm() <= 2 * (torchs - exact).norm() + 1e-6


def test_base_outputs_are_added_into_in_place(products: str) -> None:
    x = torch.randn(5, 16, requires_grad=True)
    base = torch.nn.functional.linear(x, torch.randn(8, 16))
    y = lora_linear(x, None, torch.randn(3, 16), torch.randn(8, 3), 2.0, base_output=base)
    assert (y is base or y.data_ptr() == base.data_ptr()) == (products != "flat")


# Dropout


def test_mask_statistics_and_determinism() -> None:
    mask = keep_mask(torch.tensor([123]), 700, 333, 0.25)
    assert mask.shape == (700, 333) and abs(mask.float().mean().item() - 0.75) < 0.005
    assert torch.equal(mask[100:300], keep_mask(torch.tensor([123]), 300, 340, 0.25)[100:, :333])
    assert not torch.equal(mask, keep_mask(torch.tensor([124]), 700, 333, 0.25))
    assert keep_mask(torch.tensor([1]), 9, 9, 0.0).all()
    assert not keep_mask(torch.tensor([1]), 9, 9, 1.0).any()
    rows = mask.double() - mask.double().mean()
    assert (rows[1:] * rows[:-1]).mean().abs() < 0.003  # neighbours are independent
    assert (rows[:, 1:] * rows[:, :-1]).mean().abs() < 0.003


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 1.0])
def test_dropout_replays_its_mask(dtype: torch.dtype, dropout: float) -> None:
    check(make_group(dropout=dropout, seed=torch.tensor([77])), dtype)


def test_dropout_follows_torchs_generator() -> None:
    group = make_group(dropout=0.5).to(torch.float32)
    torch.manual_seed(1)
    first, second = group.run(grouped_lora_linear), group.run(grouped_lora_linear)
    torch.manual_seed(1)
    again = group.run(grouped_lora_linear)
    assert torch.equal(first[3], again[3]) and not torch.equal(first[3], second[3])


def test_dropout_under_checkpointing() -> None:
    group = make_group(dropout=0.5).to(torch.float32)
    leaves = list(group.leaves().values())
    for reentrant in (False, True):
        torch.manual_seed(4)
        plain = torch.autograd.grad(group.run(grouped_lora_linear), leaves, group.dYs)
        torch.manual_seed(4)
        outputs = torch.utils.checkpoint.checkpoint(
            lambda x: tuple(group.run(grouped_lora_linear)), group.x, use_reentrant=reentrant
        )
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(outputs, group.dYs)
        for leaf, grad in zip(leaves, plain, strict=True):
            assert torch.equal(leaf.grad, grad)


def test_dropout_is_unbiased() -> None:
    x, A, B = torch.ones(4000, 8), torch.ones(1, 8), torch.ones(2, 1)
    y = lora_linear(x, torch.zeros(2, 8), A, B, 1.0, dropout=0.3)
    assert abs(y.mean().item() - 8) < 0.1
    assert keep_scale(0.5) == 2.0 and draw_seed(torch.device("cpu")).dtype == torch.int64


# NaN, autocast


def test_nan_propagates() -> None:
    group = make_group(ranks=(3, 8), outs=(20, 36)).to(torch.float32)
    group.lora_As[0].data[1, 2] = float("nan")
    ours, refs = group.run(grouped_lora_linear), group.run(grouped_lora_linear_ref)
    for our, ref in zip(ours, refs, strict=True):
        assert torch.equal(our.isnan(), ref.isnan())
    assert ours[0].isnan().all() and not ours[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    group = make_group(train_base=True).to(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        ours = group.results(grouped_lora_linear)  # backward under autocast too
        refs = group.results(grouped_lora_linear_ref)
    exact = make_group(train_base=True).results(grouped_lora_linear_ref)
    assert ours["y[1]"].dtype == dtype and ours["dx"].dtype == torch.float32
    assert ours["dlora_As[1]"].dtype == torch.float32
    assert_as_good_as_torch(ours, refs, exact)


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 16, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"x": torch.ones(3, 15)}, ValueError, r"weights\[0\] must be \[out, 15\]"),
        ({"weights": [torch.ones(8, 16).double()]}, TypeError, r"weights\[0\] must have x's dtype"),
        ({"weights": [torch.ones(9, 16)]}, ValueError, r"lora_Bs\[0\] must be \[9, 2\]"),
        ({"weights": None}, ValueError, "neither weights"),
        ({"weights": [torch.ones(8, 16, device="meta")]}, ValueError, "is on meta"),
        ({"lora_As": [torch.ones(2, 15)]}, ValueError, r"lora_As\[0\] must be \[rank, 16\]"),
        ({"lora_Bs": [torch.ones(8, 3)]}, ValueError, r"lora_Bs\[0\] must be \[8, 2\]"),
        ({"lora_Bs": [None]}, ValueError, "must both be given"),
        ({"lora_As": [torch.ones(2, 16, dtype=torch.int32)]}, TypeError, "must be floating"),
        ({"scalings": [1.0, 2.0]}, ValueError, "scalings must have one entry"),
        ({"biases": [torch.ones(7)]}, ValueError, r"biases\[0\] must be \[8\]"),
        ({"dropout": 1.5}, ValueError, "dropout must be in"),
        ({"base_outputs": [torch.ones(4, 8)]}, ValueError, r"base_outputs\[0\] must be"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments: dict = {
        "x": torch.ones(3, 16),
        "weights": [torch.ones(8, 16)],
        "lora_As": [torch.ones(2, 16)],
        "lora_Bs": [torch.ones(8, 2)],
        "scalings": [1.0],
    }
    with pytest.raises(error, match=message):
        grouped_lora_linear(**(arguments | change))


def test_empty_group() -> None:
    assert grouped_lora_linear(torch.ones(2, 3), [], [], [], []) == []
