"""All that the adapters use of PEFT that is no public interface or may be missing."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft import LoraConfig
from peft.import_utils import is_bnb_available
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer

try:
    from peft.tuners.lora.torchao import TorchaoLoraLinear
except ImportError:

    class TorchaoLoraLinear(lora.Linear):  # type: ignore[no-redef]
        """Stands in where PEFT has no layer of its own for torchao: no layer is of this class."""


try:
    from peft.tuners.lora import dora
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.variants import DoraLinearVariant
except ImportError:
    dora = None

    class DoraLinearLayer:  # type: ignore[no-redef]
        """Stands in: no module is of this class, and DoRA goes through PEFT."""

    class DoraLinearVariant:  # type: ignore[no-redef]
        """Likewise."""


try:
    from peft.tuners.tuners_utils import check_target_module_exists
except ImportError:  # the method that calls it
    check_target_module_exists = lora.LoraModel._check_target_module_exists

try:
    from peft.utils.other import get_pattern_key
except ImportError:

    def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
        """The first key that matches the end of a module's path; else the path."""
        matches = (key for key in pattern_keys if re.match(rf"(.*\.)?({key})$", key_to_match))
        return next(matches, key_to_match)


__all__ = [
    "BaseTunerLayer",
    "DoraLinearLayer",
    "DoraLinearVariant",
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
    return bool(getattr(dora, "ENABLE_DORA_CACHING", False))


def is_target(config: LoraConfig, path: str) -> bool:
    """Whether the configuration chooses the module at `path`."""
    return bool(check_target_module_exists(config, path))


def pattern_value(pattern: dict[str, float], path: str, default: float) -> float:
    """What a `rank_pattern` or `alpha_pattern` says of the module at `path`."""
    return pattern.get(get_pattern_key(pattern, path), default)
