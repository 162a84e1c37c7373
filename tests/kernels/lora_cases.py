"""Inputs of a group, its gradients and the error criterion: shared by the LoRA ops' tests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

RANKS = (0, 1, 3, 8, 24, 64)
OUTS = (40, 7, 96, 33, 64, 128)


@dataclass
class Group:
    x: Tensor
    weights: list[Any]
    lora_As: list[Any]
    lora_Bs: list[Any]
    scalings: list[float]
    biases: list[Any]
    dYs: list[Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(
        self,
        dtype: torch.dtype,
        adapters: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Group:
        """The same numbers in another dtype, as leaves of their own."""

        def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if tensor is None:
                return None
            copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
            return copy.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

        low = adapters or dtype
        return replace(
            self,
            x=cast(self.x, dtype),
            weights=[cast(t, dtype) for t in self.weights],
            lora_As=[cast(t, low) for t in self.lora_As],
            lora_Bs=[cast(t, low) for t in self.lora_Bs],
            biases=[cast(t, dtype) for t in self.biases],
            dYs=[t.to(device, dtype) for t in self.dYs],
        )

    def run(self, op: Any) -> list[Tensor]:
        return op(
            self.x,
            self.weights,
            self.lora_As,
            self.lora_Bs,
            self.scalings,
            self.biases,
            **self.kwargs,
        )

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x}
        for name in ("weights", "lora_As", "lora_Bs", "biases"):
            named |= {f"{name}[{m}]": t for m, t in enumerate(getattr(self, name))}
        return {n: t for n, t in named.items() if t is not None and t.requires_grad}

    def results(self, op: Any) -> dict[str, Tensor]:
        """Outputs and gradients of one forward and backward, by name."""
        outputs = self.run(op)
        leaves = self.leaves()
        used = [(y, g) for y, g in zip(outputs, self.dYs, strict=True) if y.requires_grad]
        grads: Any = [None] * len(leaves)
        if used and leaves:
            ys, gs = zip(*used, strict=True)
            grads = torch.autograd.grad(ys, list(leaves.values()), gs, allow_unused=True)
        named = {f"y[{m}]": y.detach() for m, y in enumerate(outputs)}
        return named | {f"d{n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}


def make_group(
    shape: tuple[int, ...] = (37,),
    width: int = 80,
    ranks: tuple[int, ...] = RANKS,
    outs: tuple[int, ...] = OUTS,
    bias: bool = True,
    train_base: bool = False,
    **kwargs: Any,
) -> Group:
    """A float64 group on the CPU, its numbers exact in bf16 so that no dtype rounds inputs."""
    generator = torch.Generator().manual_seed(sum(shape) + width)

    def randn(*size: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        numbers = torch.randn(*size, generator=generator, dtype=torch.float64) * scale
        return numbers.bfloat16().double().requires_grad_(grad)

    def when(rank: int, tensor: Tensor) -> Tensor | None:
        return tensor if rank else None

    return Group(
        x=randn(*shape, width, grad=True),
        weights=[randn(out, width, scale=width**-0.5, grad=train_base) for out in outs],
        lora_As=[when(r, randn(r, width, scale=width**-0.5, grad=True)) for r in ranks],
        lora_Bs=[
            when(r, randn(out, r, scale=max(r, 1) ** -0.5, grad=True))
            for out, r in zip(outs, ranks, strict=True)
        ],
        scalings=[0.5 + 0.25 * m for m in range(len(outs))],
        biases=[randn(out, grad=train_base) if bias else None for out in outs],
        dYs=[randn(*shape, out) for out in outs],
        kwargs=kwargs,
    )


def assert_as_good_as_torch(
    ours: dict[str, Tensor], torchs: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Every error against float64 is at most twice plain PyTorch's in the same dtype, plus 1e-6."""
    assert ours.keys() == torchs.keys() == exact.keys()
    for name, truth in exact.items():
        if not truth.numel():
            assert ours[name].shape == truth.shape
            continue
        error = (ours[name].double() - truth).abs().max().item()
        allowed = 2 * (torchs[name].double() - truth).abs().max().item() + 1e-6
        assert error <= allowed, f"{name}: error {error:.3g} above {allowed:.3g}"
        assert ours[name].dtype == torchs[name].dtype and ours[name].shape == truth.shape, name
