"""What blocks returned in the clean pass, kept to be returned again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from adarank_fast.batches import repeat
from adarank_fast.reuse import Forward


@dataclass(frozen=True)
class Recorded:
    """A tensor that a block returned.

    Attributes:
        tensor: a copy, as the model may go on to change its own in place; or NaN of its shape and
            no storage.
        device: where the block returned it.
    """

    tensor: Tensor
    device: torch.device

    @staticmethod
    def of(tensor: Tensor, offload: bool) -> Recorded:
        return Recorded(tensor.to("cpu" if offload else tensor.device, copy=True), tensor.device)

    @property
    def offloaded(self) -> bool:
        return self.tensor.device != self.device

    @property
    def nbytes(self) -> int:
        return self.tensor.untyped_storage().nbytes()

    def blank(self) -> Recorded:
        """NaN in its place; numbers that are no floating-point ones are kept."""
        if not self.tensor.is_floating_point():
            return self
        nan = self.tensor.new_full((), math.nan, device=self.device)
        return Recorded(nan.expand(self.tensor.shape), self.device)

    def folded(self, folds: int) -> Tensor:
        """A copy, `folds` times on top of one another."""
        tensor = self.tensor
        if folds > 1 and tensor.dim() and not any(tensor.stride()):  # blank
            return tensor.as_strided((folds * tensor.shape[0], *tensor.shape[1:]), tensor.stride())
        tensor = tensor.to(self.device)
        return repeat(tensor, folds) if folds > 1 else tensor.clone()


def answer(tree: Any, repeats: list[bool] | None, folds: int) -> Forward:
    """A forward that returns a recorded output, folded; always a copy, as models write in place."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten(tree)
        flags = iter(repeats or ())
        out = []
        for leaf in leaves:
            if isinstance(leaf, Recorded):
                out.append(leaf.folded(folds if next(flags, True) else 1))
            else:
                out.append(leaf)
        return tree_unflatten(out, spec)

    return forward
