"""Experts whose weights are 3-D parameters: who holds them, their shapes, how many a token uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from adarank_fast.models.torch_private import is_convolution

# what configurations call it where no router says it
PER_TOKEN = ("num_experts_per_tok", "top_k_experts")


class ExpertShape(NamedTuple):
    """A 3-D parameter: how many experts, and the product of each."""

    experts: int
    in_features: int
    out_features: int


def expert_shapes(module: nn.Module) -> dict[str, ExpertShape]:
    """Name -> shape of a module's own 3-D parameters.

    PEFT's reading of the layout: [experts, out, in], or [experts, in, out] where the module says
    `is_transposed`. Convolutions are none; a first dimension of 1 is a position embedding's.
    """
    if is_convolution(module):
        return {}
    shapes = {}
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and parameter.shape[0] > 1 and parameter.is_floating_point():
            experts, rows, columns = parameter.shape
            transposed = getattr(module, "is_transposed", False)
            fan_in, fan_out = (rows, columns) if transposed else (columns, rows)
            shapes[name] = ExpertShape(experts, fan_in, fan_out)
    return shapes


def holds_experts(module: nn.Module) -> bool:
    """Whether its 3-D parameters are experts': others have relative positions or scales in such.

    All experts of transformers have a class of that name, and nothing else with 3-D parameters has.
    """
    return any("Experts" in cls.__name__ for cls in type(module).__mro__)


def experts_per_token(experts: nn.Module, above: Iterable[nn.Module], count: int) -> int | None:
    """How many of `count` experts are active for a token; None where the model does not say.

    The `top_k` of the nearest router, which is what the forward goes by; else the configuration's
    `num_experts_per_tok`. Shared experts are all active.

    Args:
        experts: the module that holds the parameter.
        above: the modules that hold `experts`, nearest first.
        count: how many there are.
    """
    above = list(above)
    beside = (one for module in (experts, *above) for one in (module, *module.children()))
    found = (vars(module).get("top_k") for module in beside)
    configs = (vars(module).get("config") for module in (experts, *above))
    said = (getattr(config, name, None) for config in configs for name in PER_TOKEN)
    for values in (found, said):
        for value in values:
            if type(value) is int and value > 0:
                return min(value, count)
    return None
