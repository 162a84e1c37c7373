"""A dropout mask drawn from torch's generator is the same one whatever computes the group."""

from __future__ import annotations

import gc
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adarank_kernels import grouped_lora_linear
from adarank_kernels.lora import group as groups
from adarank_kernels.lora.backends import torch as aten
from adarank_kernels.lora.dropout import draw_mask, keep_probability, keep_scale
from adarank_kernels.runtime import native

P, SHAPE, RANKS, OUTS = 0.3, (2, 5), (3, 8, 0), (12, 7, 9)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """float16 stands for a card's types: no C++ products on the CPU, all branches of a GPU."""
    made = groups.Group.__init__

    def make(group: groups.Group, *arguments: object) -> None:
        made(group, *arguments)
        group.device_type = "cuda"

    monkeypatch.setattr(groups.Group, "__init__", make)
    monkeypatch.setattr(groups, "choose_backend", lambda x, factors: aten)
    monkeypatch.setattr(groups.Group, "_whole_backend", lambda group, x: False)
    return monkeypatch


def tensors(low: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).half()

    x = randn(*SHAPE, 16).requires_grad_()
    weights = [randn(out, 16) for out in OUTS]
    As = [randn(rank, 16).to(low).requires_grad_() for rank in RANKS]
    Bs = [randn(out, r).to(low).requires_grad_() for out, r in zip(OUTS, RANKS, strict=True)]
    return x, weights, As, Bs


@pytest.mark.parametrize("low", [torch.float16, torch.float32])
@pytest.mark.parametrize("way", ["whole", "flat", "stepwise"])
def test_every_way_draws_the_same_mask(
    on_a_gpu: pytest.MonkeyPatch, way: str, low: torch.dtype
) -> None:
    if way == "whole":
        if native.operators() is None:
            pytest.skip("no C++ compiler")
        on_a_gpu.setattr(groups.Group, "_whole_backend", lambda group, x: True)
    x, weights, As, Bs = tensors(low)
    leaves = [x, *As[:2], *Bs[:2]]

    def step() -> list[Tensor]:
        torch.manual_seed(5)
        if way == "stepwise":
            with Watching():
                outputs = grouped_lora_linear(x, weights, As, Bs, [0.5, 1.0, 1.0], dropout=P)
        else:
            outputs = grouped_lora_linear(x, weights, As, Bs, [0.5, 1.0, 1.0], dropout=P)
        total = sum((Y.float() * torch.arange(Y.numel()).view(Y.shape) / 64).sum() for Y in outputs)
        return [*outputs, *torch.autograd.grad(total, leaves)]

    torch.manual_seed(5)
    mask = draw_mask(x.detach().flatten(0, -2), keep_probability(P)).view(x.shape)
    assert 0 < mask.sum() < mask.numel()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    X, A, B = exact[0], exact[1:3], exact[3:]
    wanted = [X @ W.double().t() for W in weights]
    for m, scaling in enumerate((0.5, 1.0)):
        wanted[m] = wanted[m] + scaling * keep_scale(P) * (X * mask) @ A[m].t() @ B[m].t()
    total = sum((Y * torch.arange(Y.numel()).view(Y.shape) / 64).sum() for Y in wanted)
    wanted += torch.autograd.grad(total, exact)
    found = step()
    for ours, right in zip(found, wanted, strict=True):
        assert ((ours.double() - right).norm() / right.norm()).item() < 3e-3
    for ours, again in zip(found, step(), strict=True):
        assert torch.equal(ours, again)


def test_where_a_mask_would_take_too_much_a_seed_is_drawn(on_a_gpu: pytest.MonkeyPatch) -> None:
    x, weights, As, Bs = tensors(torch.float16)
    group = groups.Group(x, weights, [None] * 3, As, Bs, [1.0] * 3, P)
    assert group.draw(x).dtype == torch.float16
    on_a_gpu.setattr(groups, "HOST_BOUND", x.numel() // 16 * sum(OUTS) - 1)
    assert group.draw(x).dtype == torch.int64


def test_a_group_in_cpp_keeps_no_parameter_and_goes_with_its_group() -> None:
    if native.operators() is None:
        pytest.skip("no C++ compiler")
    x, A, B = torch.randn(2, 16), torch.randn(3, 16), torch.randn(5, 3)
    group = groups.Group(x, [torch.randn(5, 16)], [None], [A], [B], [1.0], 0.0)
    assert group.make_whole(x) and group.compute is not None
    number, compute = group.number, group.compute
    assert len(compute(x, number, None, (), 0, 1 << 30)) == 1
    assert compute(x.double(), number, None, (), 0, 1 << 30) == []  # it does not fit
    B.data = torch.randn(5, 4)
    assert compute(x, number, None, (), 0, 1 << 30) == []
    gone = ref(A)
    del group, A
    gc.collect()
    assert gone() is None
    x, W = torch.randn(2, 16), torch.randn(5, 16)
    assert groups.Group(x, [W], [None], [None], [None], [1.0], 0.0).make_whole(x)
    with pytest.raises(RuntimeError, match=f"no group {number}"):
        compute(x, number, None, (), 0, 1 << 30)
