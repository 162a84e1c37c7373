"""Inside the probed block: products that no perturbation has reached are not computed again.

A variant of the value projection leaves query and key as they were; one of the second feed-forward
layer leaves everything before it. No knowledge of the architecture is needed: a linear layer
whose input equals that of the clean pass, bit for bit, gives the output of the clean pass.
"""

from __future__ import annotations

from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from adarank_fast.models.forward_patching import Patch, TensorForward
from adarank_fast.models.targets import linear_shape
from adarank_fast.models.torch_private import version

Call = tuple[Tensor, Tensor]  # input, output


def plain_linears(block: nn.Module) -> list[nn.Module]:
    """Linear and Conv1D modules whose output depends on their input and parameters alone."""
    return [
        module
        for module in block.modules()
        if linear_shape(module) and (type(module) is nn.Linear or type(module).__name__ == "Conv1D")
    ]


class LinearCache:
    """Inputs and outputs of a block's linear layers in the clean pass over one batch.

    A layer that ran more than once is left alone.
    """

    def __init__(self) -> None:
        self._calls: dict[nn.Module, list[Call]] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None  # shared inputs are kept once

    def fill(self, module: nn.Module, original: TensorForward) -> TensorForward:
        """A forward that keeps what it is given and what it returns."""

        def forward(x: Tensor) -> Tensor:
            y = original(x)
            # Copies: the model may go on to change its own in place.
            self._calls.setdefault(module, []).append((self._copy(x), y.clone()))
            return y

        return forward

    def _copy(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x or self._last[1] != version(x):
            self._last = x, version(x), x.clone()
        return self._last[2]

    def close(self) -> int:
        """Release what only recording needs; returns the bytes of the rest."""
        self._last = None
        self._calls = {module: calls for module, calls in self._calls.items() if len(calls) == 1}
        kept = {t for calls in self._calls.values() for call in calls for t in call}
        return sum(tensor.nbytes for tensor in kept)

    def patches(self, folds: int) -> dict[nn.Module, Patch]:
        """Module -> a patch for the batch folded `folds` times."""
        same = _Same()
        return {
            module: partial(_compute_what_changed, calls[0], folds, same)
            for module, calls in self._calls.items()
        }


def _compute_what_changed(
    call: Call, folds: int, compare: _Same, original: TensorForward
) -> TensorForward:
    """A forward that computes only those variants whose input is not that of the clean pass."""
    clean_x, clean_y = call

    def forward(x: Tensor) -> Tensor:
        if x.shape != (folds * clean_x.shape[0], *clean_x.shape[1:]) or x.dtype != clean_x.dtype:
            return original(x)
        variants = x.unflatten(0, (folds, clean_x.shape[0]))
        same = compare(x, variants, clean_x)
        if not any(same):
            return original(x)
        y = clean_y.new_empty(folds, *clean_y.shape)
        for is_same, group in groupby(range(folds), key=same.__getitem__):
            members = list(group)
            some = slice(members[0], members[-1] + 1)
            if is_same:
                y[some] = clean_y
            else:
                y[some] = original(variants[some].flatten(0, 1)).view_as(y[some])
        return y.flatten(0, 1)

    return forward


class _Same:
    """Which variants of an input equal the clean one; found once for layers that share it."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Tensor, list[bool]] | None = None

    def __call__(self, x: Tensor, variants: Tensor, clean: Tensor) -> list[bool]:
        if self._last is not None:
            last_x, written, last_clean, same = self._last
            if last_x is x and written == version(x) and last_clean is clean:
                return same
        if x.device.type == "cpu":
            if all(_is_wide(t) for t in (variants, clean)):
                # Bits are compared, and faster eight bytes at a time.
                variants, wide = (t.view(-1).view(torch.int64) for t in (variants, clean))
                same = [torch.equal(variant, wide) for variant in variants.view(-1, len(wide))]
            else:
                same = [torch.equal(variant, clean) for variant in variants]
        else:
            same = (variants == clean).flatten(1).all(1).tolist()  # waits for the device once
        self._last = x, version(x), clean, same
        return same


def _is_wide(tensor: Tensor) -> bool:
    """Whether its items can be read eight bytes at a time."""
    offset = tensor.storage_offset() * tensor.element_size()
    return tensor.is_contiguous() and not (offset % 8 or tensor[0].nbytes % 8)
