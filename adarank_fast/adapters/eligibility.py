"""Whether a call of a PEFT layer may be fused, and what the answer rests on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Layer = Any  # a PEFT LoRA layer
SAFE_BASES = (
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
)  # nobody else holds what their forward returns


def why_not_here(x: Tensor) -> str:
    """Why no layer is fused in a call with x, whatever the layer; "" if there is no reason."""
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if torch._C._get_tracing_state() is not None:
        return "traced by torch.jit"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return ""


def why_not(layer: Layer, x: Tensor) -> str:
    """Why this call must go through PEFT's own forward; "" if it need not."""
    if layer.disable_adapters:
        return "adapters disabled"
    if getattr(layer, "_is_replica", False):
        return "a replica of DataParallel"
    if not torch.compiler.is_compiling() and (reason := why_not_here(x)):
        return reason
    if layer.merged:
        return "merged"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return "several active adapters" if names else "no active adapter here"
    name = names[0]
    if name in layer.lora_variant:
        return f"a LoRA variant ({type(layer.lora_variant[name]).__name__})"
    base, lora_A, lora_B = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    if lora_B.bias is not None:
        return "lora_bias"
    if type(layer.lora_dropout[name]) not in (nn.Dropout, nn.Identity):
        return f"dropout is a {type(layer.lora_dropout[name]).__name__}"
    for module in (base, lora_A, lora_B):
        if module._forward_hooks or module._forward_pre_hooks:
            return "hooks inside the layer"
        if module._backward_hooks or module._backward_pre_hooks:
            return "hooks inside the layer"
        if hasattr(module, "_hf_hook"):
            return "offloaded"
        if "forward" in module.__dict__:
            return "a forward replaced inside the layer"
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return f"lora_A is a {type(lora_A).__name__}"
    if not (_is_plain(lora_A.weight) and _is_plain(lora_B.weight)):
        return f"its parameters are {type(lora_A.weight).__name__}"
    if lora_A.weight.dim() != 2 or lora_A.weight.shape[0] != lora_B.weight.shape[-1]:
        return "lora_A and lora_B do not fit each other"
    if not isinstance(base, nn.Linear) and type(base).__name__ != "Conv1D":
        return f"base layer is a {type(base).__name__}"
    if type(base.weight).__name__ == "DTensor":
        return "its parameters are DTensor"
    if has_plain_base(layer) and base.weight.dtype != x.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            return "input and weight differ in dtype"
    return "" if x.is_floating_point() else "integer input"


def has_plain_base(layer: Layer) -> bool:
    """A weight to multiply with; otherwise (quantised) the base layer computes its own product."""
    base = layer.base_layer
    plain_class = type(base) is nn.Linear or type(base).__name__ == "Conv1D"
    return plain_class and _is_plain(base.weight)


def _is_plain(parameter: Tensor) -> bool:
    """No DTensor, no quantised subclass."""
    return type(parameter) in (nn.Parameter, Tensor)


def returns_its_own(base: nn.Module) -> bool:
    """Whether nobody else can hold what the base layer's forward returns: known classes only."""
    cls = type(base)
    return cls is nn.Linear or (
        cls.__module__.startswith("bitsandbytes.")
        and cls.__name__ in ("Linear4bit", "Linear8bitLt")
    )


def active_name(layer: Layer) -> str:
    return next(name for name in layer.active_adapters if name in layer.lora_A)


def dropout_of(layer: Layer) -> float:
    """The probability in force now."""
    module = layer.lora_dropout[active_name(layer)]
    return module.p if type(module) is nn.Dropout and module.training else 0.0


class Member:
    """A layer that was found fusable, with everything that this rested on.

    `holds` compares it with the layer's attributes. It goes through `__dict__`: an attribute of a
    module costs a microsecond, of its parameters and submodules several, thousands of times a step.
    Shapes, dtypes and storages of the parameters are compared by `adarank_kernels.lora.group.Group`
    and by the operators themselves.

    Attributes:
        foreign: the base layer computes its own product (quantised weights, a subclass of Linear).
        weight, bias: of a base layer that is not foreign; [out, in], a view for a Conv1D.
        A, B: the adapter's parameters.
        scaling: a number; layers with a tensor as scaling are not remembered.
    """

    __slots__ = (
        "active", "name", "base", "lora_A", "lora_B", "drop", "foreign", "base_class", "own_weight",
        "own_bias", "weight", "bias", "A", "B", "scaling", "trained", "bias_trained", "inner",
    )  # fmt: skip

    def __init__(self, layer: Layer) -> None:
        self.active = copy.copy(layer._active_adapter)
        self.name = name = active_name(layer)
        self.base, self.lora_A = layer.base_layer, layer.lora_A[name]
        self.lora_B, self.drop = layer.lora_B[name], layer.lora_dropout[name]
        self.foreign = not has_plain_base(layer)
        self.base_class = type(self.base)
        self.own_weight, self.own_bias = self.base.weight, getattr(self.base, "bias", None)
        self.weight = self.bias = None
        if not self.foreign:
            transposed = self.base_class is not nn.Linear
            self.weight = self.own_weight.t() if transposed else self.own_weight
            self.bias = self.own_bias
        self.A, self.B, self.scaling = self.lora_A.weight, self.lora_B.weight, layer.scaling[name]
        # a foreign base computes its own gradients
        self.trained = not self.foreign and self.own_weight.requires_grad
        self.bias_trained = self.bias is not None and self.bias.requires_grad
        self.inner = (self.base.__dict__, self.lora_A.__dict__, self.lora_B.__dict__)

    @property
    def dropout(self) -> float:
        drop = self.drop
        return drop.p if type(drop) is nn.Dropout and drop.training else 0.0

    def is_active(self, own: dict[str, Any]) -> bool:
        """The part of `holds` that may change between two calls of one forward."""
        _, of_A, of_B = self.inner
        return not (
            own["_disable_adapters"]
            or own["merged_adapters"]
            or own["_active_adapter"] != self.active
            or of_A["_parameters"].get("weight") is not self.A
            or of_B["_parameters"].get("weight") is not self.B
            or own["scaling"].get(self.name) is not self.scaling
        )

    def holds(self, own: dict[str, Any]) -> bool:
        """Whether the layer with these attributes is still what it was."""
        if own["_disable_adapters"] or own["merged_adapters"] or "_is_replica" in own:
            return False
        name = self.name
        scaling = own["scaling"].get(name)
        if own["_active_adapter"] != self.active or name in own["lora_variant"]:
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
            or type(self.lora_A) is not nn.Linear
            or type(self.lora_B) is not nn.Linear
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
            and of_B["_parameters"].get("bias") is None
            and (self.foreign or weight.requires_grad is self.trained)
            and (self.bias is None or self.bias.requires_grad is self.bias_trained)
        )


def remember(layer: Layer) -> Member | None:
    """What a fusable layer rests on; None if that cannot be compared."""
    scaling = layer.scaling[active_name(layer)]
    return Member(layer) if type(scaling) in (float, int) else None
