"""All that prediction uses of torch without a promise that it stays: one function a name.

torch has no public module for trees of tensors and none for watching operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

_LEAVES = {Tensor, nn.Parameter, type(None), bool, int, float, str}


def leaves(tree: object) -> list[object]:
    """Everything in nested tuples, lists, dicts and model outputs, in a fixed order."""
    kind = type(tree)  # torch's own function takes five times as long for arguments of operators
    if kind is tuple or kind is list:
        return [leaf for child in cast("list[object]", tree) for leaf in leaves(child)]
    return [tree] if kind in _LEAVES else tree_flatten(tree)[0]


def map_leaves(kind: type, change: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with each leaf of one class replaced by `change(leaf)`, in that order."""
    return tree_map_only(kind, change, tree)


def version(tensor: Tensor) -> int:
    """How often the tensor was written to in place; writes to inference tensors leave no trace."""
    return 0 if tensor.is_inference() else tensor._version


def compiled_from(model: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` wrapped; None for any other."""
    return cast("nn.Module | None", getattr(model, "_orig_mod", None))


def is_convolution(module: nn.Module) -> bool:
    """True for every class of convolution; all of them have a base class without a public name."""
    base = getattr(nn.modules.conv, "_ConvNd", None)
    if base is None:
        return type(module).__name__.startswith(("Conv", "LazyConv")) and hasattr(module, "stride")
    return isinstance(module, base)


def is_read_not_called(module: nn.Module | None) -> bool:
    """True for `out_proj` of a torch.nn.MultiheadAttention, whose forward is never called."""
    return isinstance(module, NonDynamicallyQuantizableLinear)
