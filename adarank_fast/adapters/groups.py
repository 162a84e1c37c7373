"""Which layers read the very same tensor: they are computed together, by the first one called.

A group is found by watching: layers of one owner (the module whose forward calls them) that got the
same tensor object, one after the other. In later forwards its first member computes every output;
the others hand theirs out. Nothing is kept longer than one forward of the owner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

Compute = Callable[[Sequence[Any], Tensor], Sequence[Tensor]]


class Group:
    """Layers of one owner that share an input, in the order of their calls."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.members = list(members)
        self.whole = True  # False: a member stayed away once; computed one by one since
        # (input, what must hold still, place -> what that member will hand out)
        self._pending: tuple[Tensor, tuple[Any, ...], dict[int, Tensor]] | None = None

    def call(
        self, place: int, x: Tensor, adapter: str | tuple[str, ...], compute: Compute
    ) -> Tensor | None:
        """The output of the member at `place`; None if the group cannot answer for it.

        `adapter` is what is active: another one's outputs are not handed out.
        """
        if place:
            return self.hand_out(place, x, adapter)
        mode = _mode(x)
        self.clear()
        if mode is None:
            return None
        outputs = compute(self.members, x)
        if len(outputs) > 1:
            self._pending = x, (adapter, *mode), dict(enumerate(outputs[1:], start=1))
        return outputs[0]

    def hand_out(self, place: int, x: Tensor, adapter: str | tuple[str, ...]) -> Tensor | None:
        """What the first member computed for the one at `place`, once, for this very input."""
        pending = self._pending
        if pending is None or pending[0] is not x:
            return None
        mode = _mode(x)
        if mode is None or pending[1] != (adapter, *mode):
            return None
        output = pending[2].pop(place, None)
        if not pending[2]:
            self._pending = None
        return output

    def clear(self) -> None:
        """Forget what nobody asked for."""
        self._pending = None

    def owner_returned(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook of the owner: nothing outlives its forward."""
        if self._pending is not None:
            if output is not None:  # None: an exception, or checkpointing stopped early
                self.whole = False
            self.clear()


class Owner:
    """A module whose forward calls layers: watches them for one forward, then groups them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.settled = False
        self._seen: list[tuple[nn.Module, ref[Tensor], int]] = []
        self._forwards = self._recomputations = 0
        self._checkpointed = False

    def saw(self, layer: nn.Module, x: Tensor) -> None:
        """Note a call; settle the groups when a new forward begins.

        Checkpointing calls the layers again in the backward pass, and they must then compute what
        they computed in the forward pass: not before every forward so far has been recomputed.
        """
        if not any(layer is seen for seen, _, _ in self._seen):
            self._seen.append((layer, ref(x), _version(x)))
            self._checkpointed |= _may_be_recomputed(layer)
        if layer is not self._seen[0][0]:
            return
        if torch._C._current_graph_task_id() != -1:  # in a backward pass
            self._recomputations += 1
        elif self._forwards and not (self._checkpointed and self._recomputations < self._forwards):
            self.settle()
        else:
            self._forwards += 1

    def settle(self) -> None:
        """Group consecutive calls that got the same tensor."""
        for members in _runs(self._seen):
            group = Group(members)
            _add_hook(self.module, group)
            for place, layer in enumerate(members):
                state: Any = layer._adarank
                state.group, state.place = group, place
        self._seen = []
        self.settled = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": []}  # weak references are not saved


def _runs(seen: Sequence[tuple[nn.Module, ref[Tensor], int]]) -> list[list[nn.Module]]:
    """Layers that got the same tensor one after the other, two or more."""
    runs: list[list[nn.Module]] = []
    last: tuple[ref[Tensor], int] | None = None
    for layer, x, version in seen:
        if last == (x, version) and last[0] is x:  # one weakref object per tensor
            runs[-1].append(layer)
        else:
            runs.append([layer])
        last = x, version
    return [run for run in runs if len(run) > 1]


def find_groups(
    model: nn.Module, paths: Mapping[str, str], run: Callable[[], object]
) -> list[tuple[str, ...]]:
    """Which modules would be computed together, before any has an adapter.

    Args:
        model: without PEFT layers.
        paths: name -> path of each module.
        run: runs one forward of the model.

    Returns:
        The names of each group's members, in the order of their calls.
    """
    names = {model.get_submodule(path): name for name, path in paths.items()}
    owners: dict[str, list[tuple[nn.Module, ref[Tensor], int]]] = {}

    def watch(path: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen = owners.setdefault(owner_path(model, path), [])
            if not any(module is other for other, _, _ in seen):
                seen.append((module, ref(inputs[0]), _version(inputs[0])))

        return module.register_forward_pre_hook(hook)

    hooks = [watch(paths[name], module) for module, name in names.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [tuple(names[m] for m in members) for seen in owners.values() for members in _runs(seen)]


def _add_hook(module: nn.Module, group: Group) -> None:
    """`register_forward_hook(always_call=True)` under the same key in every module.

    Compiled code is guarded by the keys, and torch's count up over the process: blocks that run the
    same code would each be compiled anew. torch's are never negative.
    """
    key = -1 - sum(key < 0 for key in module._forward_hooks)
    module._forward_hooks[key] = group.owner_returned
    module._forward_hooks_always_called[key] = True


def remove_hooks(model: nn.Module) -> None:
    """Take every group's hook away, also of groups whose layers are gone."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Group):
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def owner_path(model: nn.Module, path: str) -> str:
    """The nearest module above `path` that is not a mere container."""
    parent = path.rpartition(".")[0]
    while parent and isinstance(
        model.get_submodule(parent), (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    ):
        parent = parent.rpartition(".")[0]
    return parent


def _mode(x: Tensor) -> tuple[Any, ...] | None:
    """What must still hold when a member hands out its output; None: it cannot be told."""
    if not torch.compiler.is_compiling() and x.is_inference():  # changes in place leave no trace
        return None
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), autocast, _version(x)


def _version(x: Tensor) -> int:
    """Changes made in place. A compiler has none; a group is not made where any were seen."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def _may_be_recomputed(layer: nn.Module) -> bool:
    """Whether this call may be inside `torch.utils.checkpoint`, of either kind."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None or (layer.training and not torch.is_grad_enabled())
