"""Which layers read the very same tensor: they are computed together, by the first one called.

A group is found by watching: layers below one module (their owner) that got the same tensor, one
after the other, with no other fused layer between them. From the next forward on its first member
computes every output, and the others take theirs. Outputs that wait to be taken belong to one
thread and are dropped when any other fused layer is called in it, so at most one group's outputs
wait in a thread. They are taken only for the same tensor, unchanged, on the same stream, in the
same modes, with the same parameters.

Checkpointing runs a forward twice and compares what both saved, so both must be grouped alike: no
group is formed or dissolved while a forward of its layers, under hooks for saved tensors, has not
had its backward pass.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from adarank_fast.adapters.members import AnyMember
from adarank_fast.adapters.peft_private import Attributes, Layer
from adarank_fast.undo import undone
from adarank_kernels.lora.group import Group
from adarank_kernels.lora.op import is_watched, quickly

WATCHED = 2  # forwards after which a layer that shared its input with nobody is watched no more
MISSED = 3  # forwards in a row in which a member stayed away; then its group is dissolved

_forming = threading.Lock()
# Looked up once: they are called for every layer of every forward.
_current_graph_task = torch._C._current_graph_task_id
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_is_autocast_enabled, _is_grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled


class Owner:
    """The module whose forward calls layers; how many of its forwards may still be repeated."""

    def __init__(self) -> None:
        self.outstanding = 0

    def __getstate__(self) -> dict[str, object]:
        return {"outstanding": 0}  # a copy's graphs are its own


class Outstanding:
    """Lives as long as a forward that checkpointing may repeat."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        with _forming:
            owner.outstanding += 1

    def __del__(self) -> None:
        self._owner.outstanding -= 1


class LayerGroup:
    """Layers that share an input, in the order of their calls."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        self.missed = 0
        self.traced: tuple[Tensor, list[Tensor]] | None = None  # waits inside one compiled graph


class LayerState:
    """What a fused layer knows beyond PEFT's attributes.

    Attributes:
        owner: shared by the layers of one module.
        group: with whom it is computed, and its position there.
        fused, fallbacks: eager calls, and those that went through PEFT, by reason.
        member: what the layer rests on, if that is remembered.
        call: of a group's first member, or a layer alone: what was computed last, to be computed
            again.
        steady: `call`, where nothing is left to find out: who shares the input, what is made anew.
    """

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.group: LayerGroup | None = None
        self.position = 0
        self.fused = 0
        self.fallbacks: Counter[str] = Counter()
        self.member: AnyMember | None = None
        self.call: Call | None = None
        self.steady: Call | None = None
        self.candidates: list[Layer] | None = None
        self.alone = 0  # forwards in which it shared its input with nobody

    def __getstate__(self) -> dict[str, object]:
        gone = dict.fromkeys(("member", "call", "steady", "candidates"))
        return {**self.__dict__, **gone}


class Call:
    """Layers computed in one operator: its arguments but x, and all that they rest on.

    Attributes:
        group: the operator's arguments.
        members: of each layer, what `group` was made of.
        dropout: likewise.
        rests_on: each layer's attributes, its member and its dropout.
        quick: False once the operator had no quick way for foreign base products.
    """

    __slots__ = ("group", "members", "dropout", "rests_on", "foreign", "kind", "index", "quick")

    def __init__(
        self, group: Group, layers: Sequence[Layer], members: Sequence[AnyMember], dropout: float
    ) -> None:
        self.group, self.members, self.dropout = group, list(members), dropout
        self.rests_on = [
            (layer.__dict__, m, m.dropout) for layer, m in zip(layers, members, strict=True)
        ]
        self.foreign = any([m.foreign for m in members])
        self.kind, self.index = group.device.type, group.device.index or 0
        self.quick = True

    def bases(self, x: Tensor) -> Sequence[Tensor | None]:
        """Products of the foreign base layers; empty if there are none."""
        return [m.base(x) if m.foreign else None for m in self.members] if self.foreign else ()

    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """All outputs, if all is as it was and there is a quick way; else nothing."""
        rests_on = self.rests_on
        if forward_ad._current_level >= 0 or is_watched(x):
            return ()
        if len(rests_on) > 1 and x.is_inference():  # changes leave no trace
            return ()
        for own, member, dropout in rests_on:
            if not member.holds(own) or member.dropout != dropout:
                return ()
        if not self.foreign:
            return quickly(self.group, x, None)
        if not self.quick or _is_autocast_enabled(self.kind):
            return ()
        outputs = quickly(self.group, x, None, self.bases(x))
        self.quick = bool(outputs)
        return outputs


class Waiting:
    """Outputs that a group's first member computed for the others."""

    __slots__ = (
        "group", "x", "version", "kind", "index", "modes", "dropout", "outputs", "versions",
        "repeating", "left",
    )  # fmt: skip

    def __init__(
        self,
        group: LayerGroup,
        x: Tensor,
        dropout: float,
        outputs: Sequence[Tensor],
        members: Sequence[AnyMember],
        kind: str,
        index: int,
    ) -> None:
        self.group, self.x, self.version = group, x, x._version
        self.kind, self.index, self.dropout = kind, index, dropout
        self.modes = modes_of(kind, index)
        self.outputs: list[Tensor | None] = [*outputs]
        self.outputs[0] = None
        self.left = len(outputs) - 1
        self.versions = [m.A._version + m.B._version for m in members]  # which only grow
        self.repeating = _current_graph_task() != -1
        if _saved_tensors_hooks(False) is not None:  # as `may_be_repeated`, without a frame
            repeat_guard(outputs[0], group.layers[0]._adarank.owner)

    def take(self, state: LayerState, own: Attributes) -> Tensor | None:
        """The output of a member, once; None if it is not there or no longer right."""
        position, member = state.position, state.member
        if state.group is not self.group or member is None:
            return None
        output, self.outputs[position] = self.outputs[position], None
        if output is None:
            return None
        dropout = member.dropout
        if (
            self.x._version != self.version
            or modes_of(self.kind, self.index) != self.modes
            or not member.is_active(own)
            or (dropout != self.dropout and dropout is not None)
            or member.A._version + member.B._version != self.versions[position]
        ):
            return None  # computed in vain
        self.left -= 1
        return output

    def discard(self) -> None:
        """Something else was called: note who stayed away, unless a repetition stopped early."""
        if not self.left:
            self.group.missed = 0
        elif not self.repeating:
            self.group.missed += 1
            owner: Owner = self.group.layers[0]._adarank.owner
            if self.group.missed >= MISSED and owner.outstanding == 0:
                dissolve(self.group)


class Run:
    """Layers that got one tensor, one after the other, each computed by itself."""

    def __init__(self, x: Tensor, layer: Layer) -> None:
        self.x, self.version, self.layers = ref(x), version_of(x), [layer]
        self.seed: Tensor | None = None  # one dropout mask, as a group has

    def goes_on(self, x: Tensor, layer: Layer) -> bool:
        """Whether `layer` may be the next: `x` is the run's tensor, not written since."""
        state: LayerState = layer._adarank
        return (
            self.x() is x
            and self.version == version_of(x)
            and state.owner is self.layers[0]._adarank.owner
            and not any(layer is other for other in self.layers)
        )

    def close(self) -> None:
        """It is over: its layers are candidates for a group, unless they were restored since."""
        first: LayerState | None = self.layers[0].__dict__.get("_adarank")
        if first is None or not all("_adarank" in layer.__dict__ for layer in self.layers):
            return
        if len(self.layers) > 1:
            first.candidates = self.layers
            form_group(self.layers[0])
        else:
            first.alone += 1


class ThreadState(threading.local):
    """Of each thread: what waits to be taken, and the run of layers that is being watched."""

    waiting: Waiting | None = None
    run: Run | None = None

    def clear(self) -> None:
        """Another fused layer is called, or PEFT's own forward takes over."""
        waiting, run = self.waiting, self.run
        self.waiting = self.run = None
        if waiting is not None:
            waiting.discard()
        if run is not None:
            run.close()

    def watch(self, layer: Layer, x: Tensor) -> Run | None:
        """Note a call of a layer that has no group; the run that it belongs to."""
        run = self.run
        if run is not None and run.goes_on(x, layer):
            run.layers.append(layer)
            return run
        self.clear()
        if layer._adarank.alone < WATCHED:
            self.run = Run(x, layer)
        return self.run


def form_group(layer: Layer) -> None:
    """Make the layer's candidates a group, if no forward that came before may be repeated."""
    state: LayerState = layer._adarank
    if state.candidates is None or _current_graph_task() != -1:
        return
    with _forming:
        layers, ready = state.candidates, state.owner.outstanding == 0
        if layers is not None and ready and not any(o._adarank.group for o in layers):
            make_group(layers)
            state.candidates = None


def make_group(layers: Sequence[Layer]) -> None:
    """Compute the layers in one operator from their next call on."""
    group = LayerGroup(layers)
    for position, layer in enumerate(layers):
        state: LayerState = layer._adarank
        state.position, state.group = position, group
        state.call = state.steady = None


def dissolve(group: LayerGroup) -> None:
    """Its layers are computed one by one from now on."""
    for layer in group.layers:
        state: LayerState | None = layer.__dict__.get("_adarank")
        if state is not None:
            state.group, state.position, state.call, state.steady = None, 0, None, None
            state.alone = WATCHED


def modes_of(kind: str, index: int) -> tuple[object, ...]:
    """What must still be so when an output on this device is taken."""
    autocast = torch.get_autocast_dtype(kind) if _is_autocast_enabled(kind) else None
    if kind == "cuda":
        return _is_grad_enabled(), autocast, torch._C._cuda_getCurrentRawStream(index)
    return _is_grad_enabled(), autocast


def version_of(x: Tensor) -> int:
    """Changes made in place; those of inference tensors leave no trace."""
    return 0 if x.is_inference() else x._version


def may_be_repeated() -> bool:
    """Whether hooks for saved tensors are set, as checkpointing without reentrance does."""
    return _saved_tensors_hooks(False) is not None


def repeat_guard(output: Tensor, owner: Owner) -> None:
    """Count a forward as outstanding until its backward pass, or until its graph is gone."""
    node = output.grad_fn
    if node is not None:
        held = [Outstanding(owner)]
        node.register_hook(lambda *_: held.clear())


def owner_path(model: nn.Module, path: str) -> str:
    """The nearest module above `path` that is not a mere container."""
    parent = path.rpartition(".")[0]
    while parent and isinstance(
        model.get_submodule(parent), (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    ):
        parent = parent.rpartition(".")[0]
    return parent


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
    modules = {name: model.get_submodule(path) for name, path in paths.items()}
    runs: list[tuple[ref[Tensor], int, str, list[str]]] = []

    def watch(name: str, module: nn.Module) -> None:
        owner = owner_path(model, paths[name])

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if any(name in names for *_, names in runs):
                return
            if runs and runs[-1][0]() is x and runs[-1][1:3] == (version_of(x), owner):
                runs[-1][3].append(name)
            else:
                runs.append((ref(x), version_of(x), owner, [name]))

        module.register_forward_pre_hook(hook)

    before = [(m._forward_pre_hooks, dict(m._forward_pre_hooks)) for m in modules.values()]

    def undo() -> None:
        for hooks, others in before:
            hooks.clear()
            hooks.update(others)

    with undone(undo):
        for name, module in modules.items():
            watch(name, module)
        run()
    return [tuple(names) for *_, names in runs if len(names) > 1]
