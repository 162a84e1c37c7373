"""All that the adapters use of PEFT that is no public interface or may be missing."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.import_utils import is_bnb_available
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

try:
    from peft.tuners.lora.torchao import TorchaoLoraLinear
except ImportError:

    class TorchaoLoraLinear(lora.Linear):  # type: ignore[no-redef]
        """Stands in where PEFT has no layer of its own for torchao: no layer is of this class."""


try:
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.variants import DoraLinearVariant
except ImportError:

    class DoraLinearLayer:  # type: ignore[no-redef]
        """Stands in: no module is of this class, and DoRA goes through PEFT."""

    class DoraLinearVariant:  # type: ignore[no-redef]
        """Likewise."""


try:
    from peft.tuners.lora.variants import BdLoraLinearVariant, BlockDiagonalLinear
except ImportError:

    class BdLoraLinearVariant:  # type: ignore[no-redef]
        """Stands in: no adapter is of this kind."""

    class BlockDiagonalLinear:  # type: ignore[no-redef]
        """Stands in: no module is of this class."""


try:
    from peft.tuners.lora.variants import MiCALinearVariant
except ImportError:

    class MiCALinearVariant:  # type: ignore[no-redef]
        """Stands in: no adapter is of this kind."""


try:
    from peft.tuners.lora.monteclora import MontecloraSampler
except ImportError:

    class MontecloraSampler:  # type: ignore[no-redef]
        """Stands in: no module is of this class."""


try:
    from peft.utils.other import get_pattern_key
except ImportError:

    def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
        """The first key that matches the end of a module's path; else the path."""
        matches = (key for key in pattern_keys if re.match(rf"(.*\.)?({key})$", key_to_match))
        return next(matches, key_to_match)


Layer = Any  # a LoRA layer of PEFT, whose fields have no types
Attributes = dict[str, Any]  # the `__dict__` of one

__all__ = [
    "Attributes",
    "AuxiliaryTrainingWrapper",
    "BaseTunerLayer",
    "BdLoraLinearVariant",
    "BlockDiagonalLinear",
    "DoraLinearLayer",
    "DoraLinearVariant",
    "Layer",
    "MiCALinearVariant",
    "MontecloraSampler",
    "TorchaoLoraLinear",
    "bitsandbytes_layers",
    "caches_dora",
    "is_target",
    "pattern_value",
]


def bitsandbytes_layers() -> list[type]:
    """PEFT's LoRA layers for weights quantised by bitsandbytes; none where it is not installed."""
    if not is_bnb_available():
        return []
    from peft.tuners.lora import bnb

    names = ("Linear4bit", "Linear8bitLt")
    return [getattr(bnb, name) for name in names if hasattr(bnb, name)]


def caches_dora() -> bool:
    """Whether PEFT keeps DoRA's norms in eval mode."""
    dora = sys.modules.get("peft.tuners.lora.dora")
    return bool(getattr(dora, "ENABLE_DORA_CACHING", False))


def is_target(config: LoraConfig, path: str) -> bool:
    """Whether the configuration chooses the module at `path`."""
    return bool(lora.LoraModel._check_target_module_exists(config, path))


def pattern_value(pattern: Mapping[str, float] | None, path: str, default: float) -> float:
    """What a `rank_pattern` or `alpha_pattern` says of the module at `path`."""
    pattern = pattern or {}
    value: float = pattern.get(get_pattern_key(list(pattern), path), default)
    return value


def has_only_experts(model: nn.Module) -> bool:
    """Whether parameters of experts have LoRA adapters, and nothing else has."""
    layers = [module for module in model.modules() if isinstance(module, lora.LoraLayer)]
    return bool(layers) and all(isinstance(layer, lora.ParamWrapper) for layer in layers)
