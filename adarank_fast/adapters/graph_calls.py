"""A block's call taken apart: its tensors, and all else, which must be the same in a replay.

A graph repeats one computation on the tensors that it was recorded on. So each call is compared
with the recorded one: names of arguments, layouts of tensors, values of all else (`taken_apart`),
modes of the modules (`Foundation.flags`), and which modules, parameters and storages there are
(`Foundation.why_not`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from adarank_fast.adapters.peft_private import (
    Attributes,
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    MontecloraSampler,
)

VALUES = (type(None), bool, int, float, str, torch.dtype, torch.device)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UnfitError(Exception):
    """Why a call cannot be repeated by a graph."""


class _Slot:
    """Marks the place of a tensor."""


SLOT = _Slot()


def taken_apart(value: object, tensors: list[Tensor]) -> tuple[object, Hashable]:
    """The value with a slot for each tensor, and what must be equal next time.

    Args:
        value: tensors, plain values, and tuples, lists and dicts of them.
        tensors: those of the value are appended.

    Raises:
        UnfitError: something else is in it, such as a cache.
    """
    kind: Any = type(value)
    if isinstance(value, Tensor):
        if kind not in (Tensor, nn.Parameter):
            raise UnfitError(f"an argument is a {kind.__name__}")
        if value.is_inference():
            raise UnfitError("an argument was made in inference mode")
        tensors.append(value)
        layout = (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        return SLOT, layout
    if kind in VALUES:
        return value, (kind, value)
    if isinstance(value, (tuple, list)) and kind in (tuple, list):
        parts = [taken_apart(part, tensors) for part in value]
        return kind([part for part, _ in parts]), (kind, *[key for _, key in parts])
    if isinstance(value, dict) and kind is dict:
        pairs = [(k, taken_apart(v, tensors)) for k, v in value.items()]
        return {k: part for k, (part, _) in pairs}, (dict, *[(k, key) for k, (_, key) in pairs])
    raise UnfitError(f"an argument is a {kind.__name__}")


def put_together(template: object, tensors: Iterator[Tensor]) -> object:
    """The template with the next of the tensors in each slot."""
    if template is SLOT:
        return next(tensors)
    if isinstance(template, (tuple, list)):
        return type(template)([put_together(part, tensors) for part in template])
    if isinstance(template, dict):
        return {key: put_together(part, tensors) for key, part in template.items()}
    return template


def by_name(
    names: Sequence[str], args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """A call's arguments in the order of their names.

    Raises:
        UnfitError: there are more, or one twice.
    """
    if len(args) > len(names) or any([name in kwargs for name in names[: len(args)]]):
        raise UnfitError("its arguments cannot be told by name")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: given[name] for name in sorted(given)}


class Static:
    """A tensor that graphs read, and what was last copied into it."""

    __slots__ = ("buffer", "source", "version")

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.source: ref[Tensor] | None = None
        self.version = -1

    @classmethod
    def like(cls, tensor: Tensor) -> Static:
        """A buffer of the same layout; without the zero strides of what was expanded."""
        made = torch.empty_like(tensor, requires_grad=False)
        if 0 not in tensor.stride():
            made = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
        return cls(made)

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is this tensor, unchanged since it was copied."""
        source = self.source
        return source is not None and source() is tensor and self.version == tensor._version

    def has(self, tensor: Tensor) -> bool:
        """Whether nothing need be copied: it is the buffer, or its copy."""
        return tensor.data_ptr() == self.buffer.data_ptr() or self.holds(tensor)

    def fill(self, tensor: Tensor) -> None:
        """Copy the tensor, unless it is there."""
        if self.has(tensor):
            return
        self.buffer.copy_(tensor.detach())
        self.source, self.version = ref(tensor), tensor._version


class Foundation:
    """What a block's graphs depend on beside their inputs.

    Attributes:
        parameters: that require gradients, in the block's order.
    """

    def __init__(self, block: nn.Module) -> None:
        modules = list(block.modules())
        self.modules: list[tuple[Attributes, list[object], object]] = [
            (m.__dict__, [*m._modules.values()], m.__dict__.get("forward")) for m in modules
        ]
        self.classes = [(m, type(m)) for m in modules[1:]]
        self.tensors: list[tuple[Attributes, str, Tensor, int, bool]] = [
            (own[kind], name, tensor, tensor.data_ptr(), tensor.requires_grad)
            for own in (m.__dict__ for m in modules)
            for kind in ("_parameters", "_buffers")
            for name, tensor in own[kind].items()
            if tensor is not None
        ]
        self.parameters = [p for p in block.parameters() if p.requires_grad]
        self.hooks = [m.__dict__[name] for m in modules[1:] for name in HOOKS]
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self.adapters = [m.__dict__ for m in modules if isinstance(m, kinds)]
        self.samples = any(isinstance(m, MontecloraSampler) for m in modules)
        self.dropouts = [m for m in modules if isinstance(m, nn.modules.dropout._DropoutNd)]

    def why_not(self) -> str:
        """What has changed; "" if nothing has."""
        for own, children, forward in self.modules:
            if [*own["_modules"].values()] != children or own.get("forward") is not forward:
                return "its modules have changed"
        for module, kind in self.classes:
            if type(module) is not kind:
                return "its modules have changed"
        for own, name, tensor, address, trained in self.tensors:
            if (
                own.get(name) is not tensor
                or tensor.data_ptr() != address
                or tensor.requires_grad is not trained
            ):
                return "its parameters have changed"
        return ""

    def flags(self) -> Hashable:
        """What may be switched between calls: modes, dropouts, active adapters, scalings."""
        return (
            tuple([own["training"] for own, _, _ in self.modules]),
            tuple([dropout.p for dropout in self.dropouts]),
            tuple([_adapter_flags(own) for own in self.adapters]),
        )

    def changes(self) -> str:
        """What of the next call would not be the same in a replay; "" if nothing."""
        for own in self.adapters:
            if any(isinstance(scaling, Tensor) for scaling in own.get("scaling", {}).values()):
                return "an adapter is scaled by a tensor"  # on the host: its value would be kept
            if own.get("_disable_adapters") and own.get("merged_adapters"):
                return "merged adapters that are switched off, which its forward takes out"
        return "random samples that are drawn ahead" if self.samples else ""

    def has_hooks(self) -> bool:
        """Whether a hook inside of the block would not be called."""
        return any(self.hooks)


def _adapter_flags(own: Attributes) -> Hashable:
    """Of a layer with adapters, or of a module that is trained whole (`modules_to_save`)."""
    active = own.get("_active_adapter", "default")  # the class has it until it is set
    return (
        own.get("_disable_adapters", False),
        active if isinstance(active, str) else tuple(active),
        tuple(own.get("merged_adapters", ())),
        tuple(own["scaling"].items()) if "scaling" in own else (),
    )
