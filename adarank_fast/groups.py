"""Which layers read the very same tensor: they are computed together, by the first one called.

A group is found by watching: layers of one owner (the module whose forward calls them) that got the
same tensor object, one after the other. In later forwards its first member computes every output;
the others hand theirs out. Nothing is kept longer than one forward of the owner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

Compute = Callable[[Sequence[Any], Tensor], list[Tensor]]


class Group:
    """Layers of one owner that share an input, in the order of their calls."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.members = list(members)
        self.whole = True  # False: a member stayed away once; computed one by one since
        self._input: Tensor | None = None
        self._version = 0
        self._outputs: dict[int, Tensor] = {}  # place -> what that member will hand out

    def call(self, place: int, x: Tensor, compute: Compute) -> Tensor | None:
        """The output of the member at `place`; None if the group cannot answer for it."""
        if place == 0:
            self.clear()
            outputs = compute(self.members, x)
            self._input, self._version = x, _version(x)
            self._outputs = dict(enumerate(outputs[1:], start=1))
            return outputs[0]
        if self._input is not x or self._version != _version(x):
            return None
        output = self._outputs.pop(place, None)
        if not self._outputs:
            self._input = None
        return output

    def clear(self) -> None:
        self._input = None
        self._outputs = {}

    def owner_returned(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook of the owner: nothing outlives its forward."""
        if self._outputs:
            if output is not None:  # None: an exception, or checkpointing stopped early
                self.whole = False
            self.clear()


class Owner:
    """A module whose forward calls layers: watches them for one forward, then groups them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.groups: list[Group] = []
        self.settled = False
        self._seen: list[tuple[nn.Module, ref[Tensor]]] = []
        self._hooks: list[Any] = []

    def saw(self, layer: nn.Module, x: Tensor) -> bool:
        """Note a call; True once the groups are settled, at the first layer's second call.

        Checkpointing calls a layer again within the backward pass: it must then compute what it
        computed in the forward pass, so that is too early.
        """
        if not any(layer is seen for seen, _ in self._seen):
            self._seen.append((layer, ref(x)))
        elif torch._C._current_graph_task_id() == -1:  # not in a backward pass
            self.settle()
        return self.settled

    def settle(self) -> None:
        """Group consecutive calls that got the same tensor."""
        runs: list[list[nn.Module]] = []
        last: ref[Tensor] | None = None
        for layer, x in self._seen:
            if last is not None and x is last:  # one weakref object per tensor
                runs[-1].append(layer)
            else:
                runs.append([layer])
            last = x
        for members in runs:
            if len(members) > 1:
                group = Group(members)
                self.groups.append(group)
                hook = self.module.register_forward_hook(group.owner_returned, always_call=True)
                self._hooks.append(hook)
                for place, layer in enumerate(members):
                    state: Any = layer._adarank
                    state.group, state.place = group, place
        self._seen = []
        self.settled = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": []}  # weak references are not saved

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.groups = [], []


def owner_path(model: nn.Module, path: str) -> str:
    """The nearest module above `path` that is not a mere container."""
    parent = path.rpartition(".")[0]
    while parent and isinstance(
        model.get_submodule(parent), (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    ):
        parent = parent.rpartition(".")[0]
    return parent


def _version(x: Tensor) -> int:
    """Changes made in place; unknown to a compiler, which sees them itself."""
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version
