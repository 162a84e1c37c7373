"""Find positions of the last block that the output never reads, such as all but the last token.

This needs no knowledge of the architecture. Rows of a linear layer whose gradient is zero may be
unneeded. They are unneeded if the output stays the same, bit for bit, with NaN in their place. That
holds for perturbed values too, unless the model decides on them: a comparison has no gradient and
turns NaN into False. So if a model compares, sorts or counts what a perturbation can change, every
row is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from adarank_fast.models.forward_patching import ForwardPatches, TensorForward

WORTH = 0.75  # rows are picked out if at most this share of them is read


Read = Callable[[ForwardPatches], Tensor]


class Rows:
    """Rows of a linear layer's output, all leading dimensions flattened, that are read.

    Attributes:
        total: N, rows in a clean pass over the batch.
        index: [n] int64, those that are read.
    """

    def __init__(self, read: Tensor) -> None:
        self.total = read.numel()
        self.index = read.nonzero()[:, 0]

    def only(self, original: TensorForward) -> TensorForward:
        """A forward that computes these rows of every variant and leaves zeros in the others."""

        def forward(x: Tensor) -> Tensor:
            rows = x.shape[:-1].numel()
            if not self.total or rows % self.total:
                return original(x)
            read = original(x.reshape(-1, self.total, x.shape[-1])[:, self.index])
            y = read.new_zeros(len(read), self.total, read.shape[-1])
            y[:, self.index] = read
            return y.view(*x.shape[:-1], y.shape[-1])

        return forward

    def with_nan(self, original: TensorForward) -> TensorForward:
        """A forward that leaves NaN in all other rows of a clean pass."""

        def forward(x: Tensor) -> Tensor:
            y = original(x)
            blank = y.new_full((self.total, y.shape[-1]), float("nan"))
            blank[self.index] = y.flatten(0, -2)[self.index]
            return blank.view_as(y)

        return forward


def find_needed_rows(
    read: Read, block: nn.Module, linears: Sequence[nn.Module], value: Tensor
) -> dict[nn.Module, Rows]:
    """The rows that the output reads, of linear layers in the last block that have others, too.

    Args:
        read: runs the model on a batch with some modules' forwards patched; gives its output.
        block: the last that runs.
        linears: its linear layers that depend on their input alone.
        value: the output of a clean pass, as `read` gives it.

    Returns:
        Layer -> what to compute. Empty if there is nothing to gain, or it cannot be told.
    """
    outputs: dict[nn.Module, list[Tensor]] = {module: [] for module in linears}

    def keep_output(module: nn.Module, original: TensorForward) -> TensorForward:
        def forward(x: Tensor) -> Tensor:
            y = original(x)
            if not y.requires_grad:
                y = y.detach().requires_grad_()
            outputs[module].append(y)
            return y

        return forward

    def with_gradients(original: TensorForward) -> TensorForward:
        def forward(*args: object, **kwargs: object) -> Tensor:
            torch.set_grad_enabled(True)  # from here on; the no_grad below ends it
            return original(*args, **kwargs)

        return forward

    kept_outputs = {module: partial(keep_output, module) for module in linears}
    patches = ForwardPatches(kept_outputs, {block: with_gradients})
    try:
        with torch.no_grad():
            result = read(patches)
            if not result.requires_grad:
                return {}
            once = [module for module in linears if len(outputs[module]) == 1]
            # Weights of their own, so that gradients do not cancel.
            weights = torch.rand(
                result.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            ).to(result)
            gradients = torch.autograd.grad(
                result, [outputs[module][0] for module in once], weights, allow_unused=True
            )
    except Exception:  # any error of a model that cannot compute gradients
        return {}
    found: dict[nn.Module, Rows] = {}
    for module, gradient in zip(once, gradients, strict=True):
        if gradient is not None and gradient.dim() > 1:
            used = gradient.flatten(0, -2).ne(0).any(1)
            if used.sum() <= WORTH * used.numel():
                found[module] = Rows(used)
    if not found or _are_enough(read, found, value):
        return found
    kept: dict[nn.Module, Rows] = {}
    for module, rows in found.items():  # masked keys have no gradient, and their NaN spreads
        more = {**kept, module: rows}
        kept = more if _are_enough(read, more, value) else kept
    return kept


def _are_enough(read: Read, found: Mapping[nn.Module, Rows], value: Tensor) -> bool:
    """Whether the output stays the same, bit for bit, with NaN in all other rows."""
    patches = ForwardPatches({module: rows.with_nan for module, rows in found.items()})
    try:
        return torch.equal(read(patches), value)
    except Exception:  # any error of a model on NaN
        return False
