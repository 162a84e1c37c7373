"""All that prediction uses of transformers and accelerate without a promise that it stays."""

from __future__ import annotations

from torch import Tensor, nn


def came_from_checkpoint(parameter: Tensor) -> bool:
    """True for a parameter that `from_pretrained` found in the checkpoint.

    transformers marks these, and no others. A model without any mark is taken for one made from a
    config, and none of its weights counts as missing.
    """
    return getattr(parameter, "_is_hf_initialized", False)


def is_moved_by_hooks(module: nn.Module) -> bool:
    """True if accelerate brings a module's inputs or weights to a device when it is called."""
    return hasattr(module, "_hf_hook")
