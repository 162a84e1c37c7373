"""PEFT's own layers compiled block by block: what `compile_blocks` is compared with."""

from __future__ import annotations

from typing import Any

from peft.tuners import lora
from torch import nn

from adarank_fast.adapters.torch_private import (
    mark_dynamic,
    parameter_shape_settings,
    set_parameter_shape_settings,
)
from adarank_fast.models.targets import find_blocks, unwrap


def compile_plain_blocks(peft_model: nn.Module, mode: str) -> nn.Module:
    """Each block on its own, the ranks variable, as `adarank_fast.compile_blocks` has it."""
    set_parameter_shape_settings(dict.fromkeys(parameter_shape_settings(), False))
    for module in peft_model.modules():
        if isinstance(module, lora.LoraLayer):
            layer: Any = module
            for dimension, parts in enumerate((layer.lora_A, layer.lora_B)):
                for part in parts.values():
                    mark_dynamic(part.weight, dimension)
    inner = unwrap(peft_model)
    for path in find_blocks(inner):
        inner.get_submodule(path).compile(mode=mode)
    return peft_model
