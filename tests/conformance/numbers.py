"""Outputs and gradients of any model of the table, and whether two are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.conformance.architectures import ITEMS

TOLERANCE = 1e-5  # of the largest number, float32


def read(outputs: Any) -> Tensor:
    """Every floating-point tensor of a model's outputs that has a row per item, in one."""
    values = [outputs] if isinstance(outputs, Tensor) else outputs.values()
    tensors = [v for v in values if isinstance(v, Tensor) and v.shape[:1] == (ITEMS,)]
    return torch.cat([tensor.flatten(1).float() for tensor in tensors], dim=1)


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    model.eval()
    return read(model(**inputs))


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Of the adapters' parameters, in training mode with the same dropout masks every time."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    value = read(model(**inputs))
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(4))
    (value * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    assert found.keys() == expected.keys() and found
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name],
            gradient,
            rtol=tolerance,
            atol=tolerance * scale,
        )


def assert_same(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)
