"""All that is used of bitsandbytes without a promise that it stays.

On CPUs with AVX512-BF16, `Linear4bit` changes the layout of its weight in place at the first
forward in eval mode. After that its product has no gradient, without an error, so nothing before
the last quantised layer is trained, and dequantising gives wrong numbers (bitsandbytes 0.50.2).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adarank_fast.errors import AdarankError


def may_repack(module: nn.Module) -> bool:
    """True for a layer that would repack its weight, or has done so."""
    return bool(getattr(module, "support_avx512bf16_for_cpu", False))


Layer = Any  # of bitsandbytes, whose weights have fields without types


def set_repacking(module: Layer, allowed: bool) -> None:
    """Let a layer repack its weight at its next forward, or not."""
    module.support_avx512bf16_for_cpu = allowed


def is_repacked(module: nn.Module) -> bool:
    """True if the weight was repacked for the CPU."""
    state = getattr(module.weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def undo_repacking(module: Layer) -> None:
    """Bring a repacked weight back into the layout that it was quantised to.

    Raises:
        AdarankError: this version of bitsandbytes has no way back.
    """
    try:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as inverse
    except ImportError:
        raise AdarankError(
            "this version of bitsandbytes cannot undo its repacking of 4-bit weights for the CPU; "
            "load the model again and run nothing with it before"
        ) from None
    weight = module.weight
    weight.data, weight.quant_state = inverse(weight.data, weight.quant_state)


def is_int8(module: nn.Module) -> bool:
    """True for a layer whose weight is stored in 8 bits, with a scale for each row."""
    return type(module.weight).__name__ == "Int8Params"


def dequantise_int8(layer: Layer) -> Tensor:
    """The weight of an 8-bit layer as numbers; the layer stays as it is.

    PEFT's dequantize_module_weight would replace this weight by one without its scales, and the
    next forward would fail (peft 0.21.2, after a first forward on the CPU).
    """
    from bitsandbytes.functional import int8_vectorwise_dequant

    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB  # moves there
    weight: Tensor = int8_vectorwise_dequant(layer.weight.data, scales)
    return weight


def scales(module: Layer) -> dict[str, Tensor]:
    """What a quantised weight's packed numbers mean: tensors that are no buffers of the layer."""
    weight = module._parameters.get("weight")
    if type(weight).__name__ == "Int8Params":
        return {"SCB": module.state.SCB if weight.SCB is None else weight.SCB}  # moves there
    found: dict[str, Tensor] = {}
    state, prefix = getattr(weight, "quant_state", None), "quant_state"
    while state is not None:
        parts = {key: value for key, value in vars(state).items() if isinstance(value, Tensor)}
        found |= {f"{prefix}.{key}": value for key, value in sorted(parts.items())}
        state, prefix = getattr(state, "state2", None), f"{prefix}.state2"
    return found
