"""Layers that were found fusable, with everything that this finding depends on.

A layer's member is compared with the layer's attributes before each use (`holds`). It goes through
`__dict__`: an attribute of a module costs a microsecond, of its parameters and submodules several,
thousands of times a step. Shapes, dtypes and storages of the parameters are compared by
`adarank_kernels.lora.group.Group` and by the operators themselves.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from adarank_fast.adapters.peft_private import Attributes, Layer, caches_dora
from adarank_fast.adapters.terms import (
    adapters_of,
    bias_of,
    blocks_of,
    finished,
    has_plain_base,
    is_dora,
    low_rank,
    names_of,
    weight_of,
)

Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]


class Versions:
    """Replaces a parameter where only its version is read: has the versions of several, or none."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    @property
    def _version(self) -> tuple[int, ...]:
        return tuple([tensor._version for tensor in self.tensors])


class Member:
    """A layer with one active adapter, or without (`Unadapted`).

    Attributes:
        made: its low-rank term is made anew in each call.
        foreign: the base layer computes its own product (quantised weights, a subclass of Linear).
        weight, bias: of a base layer that is not foreign; [out, in], a view for a Conv1D.
        A, B: the adapter's parameters.
        scaling: a number; layers with a tensor as scaling are not remembered.
        lora_bias: of lora_B, or None.
    """

    __slots__ = (
        "active", "name", "base", "lora_A", "lora_B", "drop", "foreign", "base_class", "own_weight",
        "own_bias", "weight", "bias", "A", "B", "scaling", "lora_bias", "variant", "classes",
        "trained", "bias_trained", "inner",
    )  # fmt: skip
    made = False

    def __init__(self, layer: Layer, name: str | None) -> None:
        self.active = copy.copy(layer._active_adapter)
        self.name, self.base = name, layer.base_layer
        self.foreign = not has_plain_base(layer)
        self.base_class = type(self.base)
        self.own_weight, self.own_bias = self.base.weight, getattr(self.base, "bias", None)
        self.weight = self.bias = None
        if not self.foreign:
            self.weight, self.bias = weight_of(layer), self.own_bias
        # a foreign base computes its own gradients
        self.trained = not self.foreign and self.own_weight.requires_grad
        self.bias_trained = self.bias is not None and self.bias.requires_grad
        self.take_adapter(layer, name)

    def take_adapter(self, layer: Layer, name: str | None) -> None:
        """Note the parts of the adapter `name`, which the layer has."""
        self.lora_A, self.lora_B = layer.lora_A[name], layer.lora_B[name]
        self.classes: tuple[type, type] = type(self.lora_A), type(self.lora_B)
        self.drop, self.variant = layer.lora_dropout[name], layer.lora_variant.get(name)
        self.A, self.B, self.scaling = self.lora_A.weight, self.lora_B.weight, layer.scaling[name]
        self.lora_bias = getattr(self.lora_B, "bias", None)
        self.inner = (self.base.__dict__, self.lora_A.__dict__, self.lora_B.__dict__)

    @property
    def dropout(self) -> float | None:
        """The probability in force now; None without an active adapter."""
        drop = self.drop
        return drop.p if type(drop) is nn.Dropout and drop.training else 0.0

    def parts(self) -> Parts:
        """Weight, bias, A, B and scaling for the operator."""
        return self.weight, self.bias, self.A, self.B, self.scaling

    def is_active(self, own: Attributes) -> bool:
        """The part of `holds` that may change between two calls of one forward."""
        _, of_A, of_B = self.inner
        scaling = own["scaling"].get(self.name)
        return not (
            own["_disable_adapters"]
            or own["merged_adapters"]
            or own["_active_adapter"] != self.active
            or of_A["_parameters"].get("weight") is not self.A
            or of_B["_parameters"].get("weight") is not self.B
            or (
                scaling is not self.scaling  # a tensor may change unseen; a new number need not
                and (type(scaling) not in (float, int) or scaling != self.scaling)
            )
        )

    def holds(self, own: Attributes) -> bool:
        """Whether the layer with these attributes is still what it was."""
        if own["_disable_adapters"] or own["merged_adapters"] or "_is_replica" in own:
            return False
        name = self.name
        scaling = own["scaling"].get(name)
        if own["_active_adapter"] != self.active:
            return False
        if own["lora_variant"].get(name) is not self.variant:
            return False
        if scaling is not self.scaling and (
            type(scaling) not in (float, int) or scaling != self.scaling
        ):
            return False
        parts = own["_modules"]
        if (
            parts["base_layer"] is not self.base
            or parts["lora_A"]._modules.get(name) is not self.lora_A
            or parts["lora_B"]._modules.get(name) is not self.lora_B
            or parts["lora_dropout"]._modules.get(name) is not self.drop
            or type(self.base) is not self.base_class
            or type(self.lora_A) is not self.classes[0]
            or type(self.lora_B) is not self.classes[1]
        ):
            return False
        for inside in self.inner:
            if (
                inside["_forward_hooks"]
                or inside["_forward_pre_hooks"]
                or inside["_backward_hooks"]
                or inside["_backward_pre_hooks"]
                or "_hf_hook" in inside
                or "forward" in inside
            ):
                return False
        base, of_A, of_B = self.inner
        weight = self.own_weight
        return (
            base["_parameters"].get("weight") is weight
            and base["_parameters"].get("bias") is self.own_bias
            and of_A["_parameters"].get("weight") is self.A
            and of_B["_parameters"].get("weight") is self.B
            and of_B["_parameters"].get("bias") is self.lora_bias
            and (self.foreign or weight.requires_grad is self.trained)
            and (self.bias is None or self.bias.requires_grad is self.bias_trained)
        )


_NO_PARAMETER: Any = Versions([])
_NO_MODULE: Attributes = {
    "_parameters": {"weight": _NO_PARAMETER},
    "_forward_hooks": (),
    "_forward_pre_hooks": (),
    "_backward_hooks": (),
    "_backward_pre_hooks": (),
}


class Unadapted(Member):
    """A layer that has none of the active adapters: it takes part in a group with rank 0."""

    __slots__ = ()

    def take_adapter(self, layer: Layer, name: str | None) -> None:
        """Note that there is none."""
        self.lora_A = self.lora_B = self.drop = self.variant = self.scaling = self.lora_bias = None
        self.classes = type(None), type(None)
        self.A = self.B = _NO_PARAMETER
        self.inner = (self.base.__dict__, _NO_MODULE, _NO_MODULE)

    @property
    def dropout(self) -> None:
        """None: nothing is dropped, whatever the other members do."""
        return None

    def parts(self) -> Parts:
        """As a member's; A and B are None."""
        return self.weight, self.bias, None, None, 0.0

    def holds(self, own: Attributes) -> bool:
        """As a member's; and the layer still has none of the active adapters."""
        active = [self.active] if isinstance(self.active, str) else self.active
        has = own["_modules"]["lora_A"]._modules
        return not any([name in has for name in active]) and super().holds(own)


class Made:
    """A layer whose low-rank term is made in each call.

    Several adapters, `lora_bias`, DoRA, BD-LoRA.
    """

    __slots__ = (
        "names", "members", "adapters", "base", "foreign", "own_weight", "scaling", "A", "B",
        "magnitude", "fixed_dropout",
    )  # fmt: skip
    made = True

    def __init__(self, layer: Layer, names: list[str]) -> None:
        self.names, self.members = names, [Member(layer, name) for name in names]
        self.adapters = adapters_of(layer)
        first = self.members[0]
        self.base, self.foreign, self.own_weight = first.base, first.foreign, first.own_weight
        self.magnitude = None
        if is_dora(layer, names[0]):
            self.magnitude = layer.lora_magnitude_vector[names[0]]
        self.fixed_dropout = len(names) > 1 or self.magnitude is not None  # which is 0
        tensors = [t for adapter in self.adapters for t in adapter if isinstance(t, Tensor)]
        self.A, self.B = Versions(tensors), _NO_PARAMETER

    @property
    def dropout(self) -> float | None:
        """As a member's; the adapters' are the same."""
        return self.members[0].dropout

    def parts(self) -> Parts:
        """As a member's."""
        weight, bias = self.members[0].weight, self.members[0].bias
        if weight is not None:
            bias = bias_of(bias, self.adapters, weight.dtype)
        A, B, scaling = low_rank(self.adapters)
        return weight, bias, A, B, float(scaling)

    def finished(self, Y: Tensor) -> Tensor:
        """The layer's output from the operator's."""
        first = self.members[0]
        return finished(Y, first.weight, first.bias, self.adapters)

    def is_active(self, own: Attributes) -> bool:
        """As a member's, of all its adapters."""
        if self.fixed_dropout and any([member.dropout for member in self.members]):
            return False
        return all([member.is_active(own) for member in self.members])

    def holds(self, own: Attributes) -> bool:
        """As a member's, of all its adapters; and they are still the active ones, in this order."""
        has, active = own["_modules"]["lora_A"]._modules, self.members[0].active
        active = [active] if isinstance(active, str) else active
        if [name for name in active if name in has] != self.names:
            return False
        if self.fixed_dropout and any([member.dropout for member in self.members]):
            return False
        if self.magnitude is not None and not self._holds_magnitude(own):
            return False
        return all([member.holds(own) for member in self.members])

    def _holds_magnitude(self, own: Attributes) -> bool:
        dora: Layer = self.magnitude
        vectors = own["_modules"].get("lora_magnitude_vector")
        inside = dora.__dict__
        return (
            vectors is not None
            and vectors._modules.get(self.names[0]) is dora
            and inside["_parameters"].get("weight") is self.adapters[0].magnitude
            and not (caches_dora() and not dora.training)
            and not (inside["_forward_hooks"] or inside["_forward_pre_hooks"])
            and not (inside["_backward_hooks"] or inside["_backward_pre_hooks"])
            and not ("_hf_hook" in inside or "forward" in inside)
        )


AnyMember = Member | Made


def remember(layer: Layer) -> AnyMember | None:
    """What a layer's fusing depends on; None if that cannot be compared."""
    names = names_of(layer)
    if any([type(layer.scaling[name]) not in (float, int) for name in names]):
        return None
    if not names:
        return Unadapted(layer, None)
    (name, *others) = names
    lora_B = layer.lora_B[name]
    made = blocks_of(lora_B) > 1 or getattr(lora_B, "bias", None) is not None
    if others or made or is_dora(layer, name):
        return Made(layer, names)
    return Member(layer, name)
