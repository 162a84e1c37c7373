"""What one pass over a batch shows, for those who want to replay parts of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from adarank_fast.reuse import Forward


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
