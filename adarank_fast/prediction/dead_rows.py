"""Positions that the output never reads, in the last block: a pooler's, all but the last token's.

Nothing has to be known about the model: rows of a linear layer whose gradient is zero are taken for
unread, and they are if NaN in their place leaves the output as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from adarank_fast.models.forward_patching import Forward

WORTH = 0.75  # rows are picked out if at most this share of them is read


Read = Callable[[Mapping[nn.Module, Forward]], Tensor]


class Rows:
    """Rows of a linear layer's output, all leading dimensions flattened, that are read.

    Attributes:
        total: N, rows in a clean pass over the batch.
        index: [n] int64, those that are read.
    """

    def __init__(self, read: Tensor) -> None:
        self.total = read.numel()
        self.index = read.nonzero()[:, 0]

    def only(self, original: Forward) -> Forward:
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


def find_unread(
    read: Read, block: nn.Module, linears: Sequence[nn.Module], value: Tensor
) -> dict[nn.Module, Rows]:
    """The linear layers of the last block with rows that the output never reads.

    Args:
        read: runs the model on a batch with some modules' forwards replaced; gives its output.
        block: the last that runs.
        linears: its linear layers that depend on their input alone.
        value: the output of a clean pass, as `read` gives it.

    Returns:
        Layer -> what to compute. Empty if there is nothing to gain, or it cannot be told.
    """
    outputs: dict[nn.Module, list[Tensor]] = {}

    def watched(module: nn.Module) -> Forward:
        original = module.forward

        def forward(x: Tensor) -> Tensor:
            y = original(x)
            if not y.requires_grad:
                y = y.detach().requires_grad_()
            outputs.setdefault(module, []).append(y)
            return y

        return forward

    def with_gradients(*args: object, **kwargs: object) -> object:
        torch.set_grad_enabled(True)  # from here on; the caller's no_grad ends it
        return forward_of_block(*args, **kwargs)

    forwards = {module: watched(module) for module in linears}
    forward_of_block = forwards.get(block, block.forward)
    try:
        with torch.no_grad():
            result = read({**forwards, block: with_gradients})
            if not result.requires_grad:
                return {}
            once = [module for module in linears if len(outputs.get(module, ())) == 1]
            # Weights of their own, so that gradients do not cancel.
            weights = torch.rand(
                result.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            ).to(result)
            gradients = torch.autograd.grad(
                result, [outputs[module][0] for module in once], weights, allow_unused=True
            )
    except Exception:  # whatever a model says that knows no gradients
        return {}
    found: dict[nn.Module, Rows] = {}
    for module, gradient in zip(once, gradients, strict=True):
        if gradient is not None and gradient.dim() > 1:
            used = gradient.flatten(0, -2).ne(0).any(1)
            if used.sum() <= WORTH * used.numel():
                found[module] = Rows(used)
    if not found or _is_unread(read, found, value):
        return found
    kept: dict[nn.Module, Rows] = {}
    for module, rows in found.items():  # masked keys have no gradient, and their NaN spreads
        more = {**kept, module: rows}
        kept = more if _is_unread(read, more, value) else kept
    return kept


def _is_unread(read: Read, found: Mapping[nn.Module, Rows], value: Tensor) -> bool:
    def with_nan(module: nn.Module, rows: Rows) -> Forward:
        original = module.forward

        def forward(x: Tensor) -> Tensor:
            y = original(x)
            read_ones = y.flatten(0, -2)[rows.index]
            blank = y.new_full((rows.total, y.shape[-1]), float("nan"))
            blank[rows.index] = read_ones
            return blank.view_as(y)

        return forward

    return torch.equal(read({m: with_nan(m, rows) for m, rows in found.items()}), value)
