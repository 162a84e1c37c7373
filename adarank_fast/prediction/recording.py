"""Modules before all that is perturbed: embeddings, which answer from a record in every replay.

What one pass over a batch shows, for those who want to replay parts of it.

What blocks returned in the clean pass, kept to be returned again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from adarank_fast.models.batches import repeat
from adarank_fast.models.forward_patching import Forward
from adarank_fast.prediction.tolerance import is_same, is_twice


def find_entrances(root: nn.Module, inner: set[nn.Module]) -> Iterator[nn.Module]:
    """Topmost modules with embeddings and more (a norm, say), but nothing `inner`."""
    for child in root.children():
        inside = set(child.modules())
        embeds = any(isinstance(module, nn.Embedding) for module in inside)
        if embeds and len(inside) > 1:
            if inside & inner:
                yield from find_entrances(child, inner)
            else:
                yield child


def repeating(
    entrances: Mapping[nn.Module, Any], single: Trace, double: Trace
) -> dict[nn.Module, list[bool] | None]:
    """Of those, the ones whose outputs repeat in a folded batch or stay as they are; which do."""
    found: dict[nn.Module, list[bool] | None] = {}
    for module in entrances:
        both = [trace.entered.get(module, []) for trace in (double, single)]
        changeable = module in single.changeable or module in double.changeable
        if changeable or not both[1] or len(both[0]) != len(both[1]):
            continue
        pairs = list(zip(*both, strict=True))
        repeats = [is_twice(two, one) for two, one in pairs]
        if all(twice or is_same(*pair) for twice, pair in zip(repeats, pairs, strict=True)):
            found[module] = repeats
    return found


class Trace:
    """What one pass shows: the order of the blocks, how they hang together, the targets' inputs."""

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.order: list[str] = []
        self.outputs: dict[str, list[Tensor]] = {}  # block -> tensors of its output (if keep)
        self.inputs: dict[str, list[Tensor]] = {}  # target -> the input of each call (if keep)
        self.rows: dict[str, list[int]] = {}  # target -> rows of each call
        self.tokens = 0  # most vectors that a target got in one call
        self.breaks: set[str] = set()  # blocks whose output is not simply the next one's input
        self.entered: dict[nn.Module, list[Tensor]] = {}  # tensors of its output (if keep)
        self.changeable: set[nn.Module] = set()  # of those, what a perturbation might reach
        self._last: tuple[str, Tensor | None, int] | None = None

    def block(self, path: str, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._last is not None:
                before, tensor, version = self._last
                leaves = tree_flatten((args, kwargs))[0]
                passed_on = any(leaf is tensor for leaf in leaves)
                if tensor is None or not passed_on or tensor._version != version:
                    self.breaks.add(before)
            self.order.append(path)
            output = original(*args, **kwargs)
            tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
            if self.keep:
                self.outputs[path] = [tensor.clone() for tensor in tensors]
            first = tensors[0] if tensors else None
            self._last = path, first, 0 if first is None else first._version
            return output

        return forward

    def entrance(self, module: nn.Module) -> Forward:
        """Its forward, watched: once, of whole numbers, before every block and target?"""
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
            late = bool(self.order or self.rows or module in self.entered)
            if late or any(x.is_floating_point() for x in given):
                self.changeable.add(module)
            output = original(*args, **kwargs)
            tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
            self.entered[module] = [tensor.clone() for tensor in tensors] if self.keep else []
            return output

        return forward

    def target(self, name: str, original: Forward) -> Forward:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.rows.setdefault(name, []).append(x.shape[0])
            self.tokens = max(self.tokens, x.numel() // max(x.shape[-1], 1))
            if self.keep:
                self.inputs.setdefault(name, []).append(x.clone())
            return original(x, *args, **kwargs)

        return forward


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
