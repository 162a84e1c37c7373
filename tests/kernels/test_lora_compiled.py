"""grouped_lora_linear under torch.compile: gradients, one graph, no recompilation."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from torch import Tensor

from adarank_kernels import grouped_lora_linear

pytestmark = pytest.mark.usefixtures("products")


class Block(torch.nn.Module):
    def __init__(self, ranks: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        outs = [16 + 8 * m for m in range(len(ranks))]
        self.base = torch.nn.ModuleList(torch.nn.Linear(24, out) for out in outs)
        self.As = torch.nn.ParameterList(torch.randn(r, 24) / 5 for r in ranks)
        self.Bs = torch.nn.ParameterList(
            torch.randn(out, r) for out, r in zip(outs, ranks, strict=True)
        )
        self.dropout = dropout
        for parameter in self.base.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        outputs = grouped_lora_linear(
            x,
            [base.weight for base in self.base],
            list(self.As),
            list(self.Bs),
            [2.0, 0.5, 1.0][: len(self.As)],
            [base.bias for base in self.base],
            dropout=self.dropout,
        )
        return torch.cat([torch.relu_(y) for y in outputs], dim=-1)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)])
def test_compiled_gradients_whatever_the_dimensions(shape: tuple[int, ...]) -> None:
    """torch.compile of torch 2.11 loses gradients of outputs that an autograd node changed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block((3, 8, 1), 0.0)
    x = torch.randn(shape, requires_grad=True)
    parameters = [x, *block.As, *block.Bs]
    expected = torch.autograd.grad(block(x).square().sum(), parameters)
    found = torch.autograd.grad(torch.compile(block, backend="eager")(x).square().sum(), parameters)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)  # sums in another order


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_compiles_to_one_graph_without_recompiling(backend: str, dropout: float) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block((3, 8, 1), dropout)
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler, and this machine has none")
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    x = torch.randn(2, 5, 24, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(x).square().sum().backward()
    torch._dynamo.utils.counters.clear()
    if not dropout:
        ours = torch.autograd.grad(compiled(x).square().sum(), [x, *block.As, *block.Bs])
        refs = torch.autograd.grad(block(x).square().sum(), [x, *block.As, *block.Bs])
        torch.testing.assert_close(ours, refs, atol=1e-4, rtol=1e-5)
    optimiser = torch.optim.SGD([*block.As, *block.Bs], 1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(torch.randn(2, 5, 24, requires_grad=True)).square().sum().backward()
            optimiser.step()
