"""Whether a call of a PEFT layer may be fused, and what is kept of the answer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

Layer = Any  # a PEFT LoRA layer


def why_not(layer: Layer, x: Tensor) -> str:
    """Why this call must go through PEFT's own forward; "" if it need not."""
    if layer.disable_adapters:
        return "adapters disabled"
    if getattr(layer, "_is_replica", False):
        return "a replica of DataParallel"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
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


def dropout_of(layer: Layer) -> float:
    """The probability in force now."""
    module = layer.lora_dropout[active_name(layer)]
    return module.p if type(module) is nn.Dropout and module.training else 0.0


def active_name(layer: Layer) -> str:
    return next(name for name in layer.active_adapters if name in layer.lora_A)


def switched_off(layer: Layer) -> bool:
    """Whether its adapters are disabled or merged, or it is a replica."""
    own = layer.__dict__
    return bool(own["_disable_adapters"] or own["merged_adapters"] or own.get("_is_replica"))


class Known:
    """A layer found fusable and what that rested on, so that it need not be found again.

    `holds` goes through `__dict__`: an attribute of a module costs a microsecond, of its parameters
    and submodules several, and there are thousands of calls a step.
    """

    def __init__(self, layer: Layer) -> None:
        self.active = copy.copy(layer._active_adapter)
        self.name = name = active_name(layer)
        self.base, self.lora_A = layer.base_layer, layer.lora_A[name]
        self.lora_B, self.drop = layer.lora_B[name], layer.lora_dropout[name]
        self.weight, self.bias = self.base.weight, self.base.bias
        self.A, self.B, self.scaling = self.lora_A.weight, self.lora_B.weight, layer.scaling[name]
        self.inner = (self.base, self.lora_A, self.lora_B)

    def holds(self, layer: Layer, x: Tensor) -> bool:
        own, name = layer.__dict__, self.name
        if switched_off(layer) or own["_active_adapter"] != self.active:
            return False
        if name in own["lora_variant"]:
            return False
        parts = own["_modules"]
        if (
            parts["base_layer"] is not self.base
            or parts["lora_A"]._modules.get(name) is not self.lora_A
            or parts["lora_B"]._modules.get(name) is not self.lora_B
            or parts["lora_dropout"]._modules.get(name) is not self.drop
            or own["scaling"].get(name) != self.scaling
        ):
            return False
        for module in self.inner:
            inside = module.__dict__
            if (
                type(module) is not nn.Linear
                or inside["_forward_hooks"]
                or inside["_forward_pre_hooks"]
                or inside["_backward_hooks"]
                or inside["_backward_pre_hooks"]
                or "_hf_hook" in inside
                or "forward" in inside
            ):
                return False
        base, lora_B = self.base._parameters, self.lora_B._parameters
        return (
            base.get("weight") is self.weight
            and base.get("bias") is self.bias
            and self.lora_A._parameters.get("weight") is self.A
            and lora_B.get("weight") is self.B
            and lora_B.get("bias") is None
            and self.weight.dtype == x.dtype
            and not torch._C._are_functorch_transforms_active()
        )

    @property
    def dropout(self) -> float:
        drop = self.drop
        return drop.p if type(drop) is nn.Dropout and drop.training else 0.0
