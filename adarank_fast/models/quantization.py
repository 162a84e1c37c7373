"""Weights that are stored packed (bitsandbytes, torchao): as numbers, and safe to train through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from adarank_fast.models.bitsandbytes_private import (
    dequantise_int8,
    is_int8,
    is_repacked,
    may_repack,
    set_repacking,
    undo_repacking,
)
from adarank_fast.models.targets import linear_shape
from adarank_fast.undo import undone


def is_packed(module: nn.Module) -> bool:
    """True if a linear's weight is quantised: it cannot be computed with as it is."""
    weight, shape = module.weight, linear_shape(module)
    assert isinstance(weight, Tensor) and shape is not None
    return (
        is_of_torchao(weight)
        or not weight.is_floating_point()
        or weight.numel() != shape[0] * shape[1]
    )


def plain_weight(module: nn.Module, parameter: str = "") -> Tensor:
    """The weight as floating-point numbers in its own layout; a copy if it is quantised.

    Args:
        module: a linear module, or experts.
        parameter: name of the experts' parameter.
    """
    if parameter:
        values: Tensor = getattr(module, parameter)
        return values
    if not is_packed(module):
        assert isinstance(module.weight, Tensor)
        return module.weight
    if is_int8(module):
        return dequantise_int8(module)
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(module)
    return weight


def stored(parameter: Tensor) -> Tensor:
    """A parameter as an ordinary tensor; torchao's own class takes few operations."""
    parameter = parameter.detach()
    return parameter.dequantize() if is_of_torchao(parameter) else parameter


def is_of_torchao(tensor: Tensor) -> bool:
    """True for torchao's subclasses, which say that they are floating point."""
    return type(tensor).__module__.startswith("torchao.")


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU, and undo it where it has.

    See `bitsandbytes_private` for what goes wrong otherwise. Unpacked layers compute the same
    function, slower. No-op for every other model.
    """
    for module in filter(may_repack, model.modules()):
        set_repacking(module, False)
        if is_repacked(module):
            undo_repacking(module)


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """`keep_unpacked` for a while; afterwards bitsandbytes may pack again."""
    layers = list(filter(may_repack, model.modules()))

    def undo() -> None:
        for module in layers:
            set_repacking(module, True)

    with undone(undo):
        keep_unpacked(model)
        yield
