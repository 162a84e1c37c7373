"""Tensors in, tensors out: the fused operations of adarank-fast. Needs torch and triton only.

Names are imported when they are first used: `adarank_kernels.errors` alone loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adarank_kernels.disagreement.op import pairwise_disagreement
    from adarank_kernels.disagreement.reference import pairwise_disagreement_ref
    from adarank_kernels.errors import AdarankError, AdarankTypeError
    from adarank_kernels.lora.op import grouped_lora_linear, lora_linear
    from adarank_kernels.lora.reference import grouped_lora_linear_ref, lora_linear_ref
    from adarank_kernels.random.philox import philox_normal
    from adarank_kernels.random.reference import philox_normal_ref

__all__ = [
    "AdarankError",
    "AdarankTypeError",
    "grouped_lora_linear",
    "grouped_lora_linear_ref",
    "lora_linear",
    "lora_linear_ref",
    "pairwise_disagreement",
    "pairwise_disagreement_ref",
    "philox_normal",
    "philox_normal_ref",
]

_MODULES = {
    "disagreement.op": ["pairwise_disagreement"],
    "disagreement.reference": ["pairwise_disagreement_ref"],
    "errors": ["AdarankError", "AdarankTypeError"],
    "lora.op": ["grouped_lora_linear", "lora_linear"],
    "lora.reference": ["grouped_lora_linear_ref", "lora_linear_ref"],
    "random.philox": ["philox_normal"],
    "random.reference": ["philox_normal_ref"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'adarank_kernels' has no attribute {name!r}")
    return getattr(import_module(f"adarank_kernels.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
