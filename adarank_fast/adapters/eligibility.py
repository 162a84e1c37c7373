"""Whether a call of a PEFT layer may be fused, and if not why."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from adarank_fast.adapters.peft_private import (
    BdLoraLinearVariant,
    BlockDiagonalLinear,
    DoraLinearLayer,
    DoraLinearVariant,
    Layer,
    MiCALinearVariant,
    caches_dora,
)
from adarank_fast.adapters.terms import blocks_of, has_plain_base, is_dora, is_plain, names_of

AS_LORA = (BdLoraLinearVariant, MiCALinearVariant)  # other starts, other parameters, the same sum


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
    names = names_of(layer)
    for name in names:
        if reason := _why_not_adapter(layer, name):
            return reason
    if len(names) > 1:
        if any([is_dora(layer, name) for name in names]):
            return "several active adapters, DoRA among them"
        if any([_drops(layer, name) for name in names]):
            return "several active adapters with dropout"  # PEFT draws a mask for each
    base = layer.base_layer
    if reason := _why_not_module(base):
        return reason
    if not isinstance(base, nn.Linear) and type(base).__name__ != "Conv1D":
        return f"base layer is a {type(base).__name__}"
    if type(base.weight).__name__ == "DTensor":
        return "its parameters are DTensor"
    if has_plain_base(layer) and base.weight.dtype != x.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            return "input and weight differ in dtype"
    return "" if x.is_floating_point() else "integer input"


def _why_not_adapter(layer: Layer, name: str) -> str:
    lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
    if name in layer.lora_variant and (reason := _why_not_variant(layer, name)):
        return reason
    if type(layer.lora_dropout[name]) not in (nn.Dropout, nn.Identity):
        return f"dropout is a {type(layer.lora_dropout[name]).__name__}"
    for module in (lora_A, lora_B):
        if reason := _why_not_module(module):
            return reason
        if type(module) is BlockDiagonalLinear and module is lora_A:
            return "BD-LoRA with blocks in A"  # the whole A takes a multiple of their products
        if type(module) not in (nn.Linear, BlockDiagonalLinear):
            return f"lora_A is a {type(module).__name__}"
        for parameter in (module.weight, getattr(module, "bias", None)):
            if parameter is not None and not is_plain(parameter):
                return f"its parameters are {type(parameter).__name__}"
    A, B, biased = lora_A.weight, lora_B.weight, getattr(lora_A, "bias", None) is not None
    if biased or A.dim() != 2 or A.shape[0] != B.shape[-1] * blocks_of(lora_B):
        return "lora_A and lora_B do not fit each other"
    return ""


def _why_not_variant(layer: Layer, name: str) -> str:
    """Of the variants DoRA is fused where it needs no second base product, and some others."""
    variant = layer.lora_variant[name]
    if type(variant) in AS_LORA:
        return ""
    if type(variant) is not DoraLinearVariant:
        return f"a LoRA variant ({type(variant).__name__})"
    dora = layer.lora_magnitude_vector[name]
    if type(dora) is not DoraLinearLayer:
        return f"a LoRA variant ({type(dora).__name__})"
    if _drops(layer, name):
        return "DoRA with dropout"
    if not has_plain_base(layer):
        return "DoRA on a base layer with a product of its own"
    if caches_dora() and not dora.training:
        return "DoRA whose norms PEFT caches"
    if not is_plain(dora.weight):
        return f"its parameters are {type(dora.weight).__name__}"
    if dora.weight.device != layer.base_layer.weight.device:
        return "offloaded"
    return _why_not_module(dora)


def _why_not_module(module: nn.Module) -> str:
    if module._forward_hooks or module._forward_pre_hooks:
        return "hooks inside the layer"
    if module._backward_hooks or module._backward_pre_hooks:
        return "hooks inside the layer"
    if hasattr(module, "_hf_hook"):
        return "offloaded"
    if "forward" in module.__dict__:
        return "a forward replaced inside the layer"
    return ""


def _drops(layer: Layer, name: str) -> bool:
    """Whether a dropout is in force now."""
    module = layer.lora_dropout[name]
    return type(module) is nn.Dropout and module.training and module.p > 0


def dropout_of(layer: Layer) -> float | None:
    """The probability in force now; None without an active adapter."""
    names = names_of(layer)
    if not names:
        return None
    module = layer.lora_dropout[names[0]]
    return module.p if type(module) is nn.Dropout and module.training else 0.0


def returns_its_own(base: nn.Module) -> bool:
    """Whether nobody else can hold what the base layer's forward returns: known classes only."""
    cls = type(base)
    return cls is nn.Linear or (
        cls.__module__.startswith("bitsandbytes.")
        and cls.__name__ in ("Linear4bit", "Linear8bitLt")
    )
