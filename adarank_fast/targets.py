"""Which modules of a model get a rank: their names, shapes and blocks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

TargetModules = str | Iterable[str]

WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")  # DDP, torch.compile, PEFT


@dataclass(frozen=True)
class Target:
    """One linear module that can get an adapter.

    Attributes:
        name: the module's name in the bare base model (see `canonical_name`).
        path: its name in the model at hand, as `model.get_submodule` takes it.
        module: the module itself; for a PEFT layer, its base layer.
        in_features, out_features: the shape of the product, whatever layout stores it.
        block: path of the block that holds it (see `find_block`), or None.
    """

    name: str
    path: str
    module: nn.Module
    in_features: int
    out_features: int
    block: str | None


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a Linear or Conv1D, quantised or not; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # transformers': weight is [in, out]
        return module.nx, module.nf  # type: ignore[return-value]
    return None


def canonical_name(path: str, model: nn.Module | None = None) -> str:
    """The name a module has in the bare base model.

    `module.`, `_orig_mod.`, PEFT's prefix and a trailing `.base_layer` are stripped; then the
    model's own `base_model_prefix` is: `bert.encoder.layer.0` and `encoder.layer.0` are one module.
    """
    stripped = True
    while stripped:
        stripped = False
        for wrapper in WRAPPERS:
            if path.startswith(wrapper):
                path, stripped = path[len(wrapper) :], True
    path = path.replace("._orig_mod.", ".").removesuffix(".base_layer")
    prefix = base_model_prefix(model) if model is not None else ""
    return path.removeprefix(prefix)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, `torch.compile` and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "base_model"):
            inner = model.base_model
            model = getattr(inner, "model", inner)
        else:
            return model


def base_model_prefix(model: nn.Module) -> str:
    """`"bert."` for a BertForSequenceClassification, `""` for a BertModel or a module without one."""
    model = unwrap(model)
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""
