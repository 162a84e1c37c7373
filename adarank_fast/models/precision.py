"""A copy of a model in another floating-point type."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

from adarank_fast.errors import AdarankError
from adarank_fast.models.experts import holds_experts
from adarank_fast.models.quantization import is_of_torchao
from adarank_fast.models.transformers_private import is_moved_by_hooks


def copy_in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` whose floating-point parameters are cast to `dtype`.

    Buffers keep their type: rotary frequencies lose too much in bfloat16. Each parameter is cast on
    its own, so the copy takes the memory of its parameters in `dtype` and no more.

    Raises:
        AdarankError: quantised or offloaded weights cannot be cast.
    """
    packed = any(not p.is_floating_point() or is_of_torchao(p) for p in model.parameters())
    if packed or getattr(model, "is_quantized", False):
        raise AdarankError(
            f"dtype={dtype}: the model is quantised and cannot be cast; leave dtype out"
        )
    if any(map(is_moved_by_hooks, model.modules())):
        raise AdarankError(
            f"dtype={dtype}: the model is spread over devices or offloaded; leave dtype out and "
            f"load it with from_pretrained(dtype={dtype})"
        )
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        converted = parameter.detach().to(dtype, copy=True)
        memo[id(parameter)] = nn.Parameter(converted, requires_grad=False)
    copied = copy.deepcopy(model, memo)
    if dtype == torch.float64 and any(map(holds_experts, copied.modules())):
        for module in copied.modules():  # grouped products have no float64
            if hasattr(module, "set_experts_implementation"):
                cast(Any, module).set_experts_implementation("eager")
    return copied
