"""Weights that are stored packed (bitsandbytes, torchao): as numbers, and safe to train through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from adarank_fast.models.targets import linear_shape


def is_packed(module: nn.Module) -> bool:
    """True if a linear's weight is quantised: it cannot be computed with as it is."""
    weight, shape = module.weight, linear_shape(module)
    assert isinstance(weight, Tensor) and shape is not None
    if type(weight).__module__.startswith("torchao."):  # a subclass that says it is float
        return True
    return not weight.is_floating_point() or weight.numel() != shape[0] * shape[1]


def plain_weight(module: nn.Module, parameter: str = "") -> Tensor:
    """The weight as floating-point numbers in its own layout; a copy if it is quantised.

    Args:
        module: a linear module, or experts.
        parameter: name of the experts' parameter.
    """
    if parameter:
        return getattr(module, parameter)
    if not is_packed(module):
        assert isinstance(module.weight, Tensor)
        return module.weight
    if type(module.weight).__name__ == "Int8Params":
        # PEFT's dequantize_module_weight would replace this weight by one without its scales, and
        # the next forward would fail (peft 0.21.2, after a first forward on the CPU).
        from bitsandbytes.functional import int8_vectorwise_dequant

        layer: Any = module
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB  # moves there
        return int8_vectorwise_dequant(layer.weight.data, scales)
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module)


def stored(parameter: Tensor) -> Tensor:
    """A parameter as an ordinary tensor; torchao's own class takes few operations."""
    parameter = parameter.detach()
    of_torchao = type(parameter).__module__.startswith("torchao.")
    return parameter.dequantize() if of_torchao else parameter


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU, and undo it where it has.

    On CPUs with AVX512-BF16, `Linear4bit` changes the layout of its weight in place at the first
    forward in eval mode. After that its product has no gradient, without an error, so nothing
    before the last quantised layer is trained, and dequantising gives wrong numbers (bitsandbytes
    0.50.2). Unpacked layers compute the same function, slower. No-op for every other model.
    """
    module: Any
    for module in _repacking(model):
        module.support_avx512bf16_for_cpu = False
        weight = module.weight
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                weight.data, weight.quant_state
            )


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """`keep_unpacked` for a while; afterwards bitsandbytes may pack again."""
    repacking = _repacking(model)
    try:
        keep_unpacked(model)
        yield
    finally:
        for module in repacking:
            module.support_avx512bf16_for_cpu = True


def _repacking(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
