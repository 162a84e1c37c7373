"""All that the adapters use of torch's compiler that is no public interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adarank_fast.errors import AdarankRuntimeError

Function = TypeVar("Function", bound=Callable[..., Any])


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` or `module.compile()` was called."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, without importing the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def let_parameter_shapes_vary() -> None:
    """Have the compiler take parameters' shapes as variables where they are marked, process-wide.

    Raises:
        AdarankRuntimeError: this torch has no such setting.
    """
    config = torch._dynamo.config
    for name in ("force_parameter_static_shapes", "force_nn_module_property_static_shapes"):
        if not hasattr(config, name):
            raise AdarankRuntimeError(
                f"torch {torch.__version__} has no torch._dynamo.config.{name}, without which "
                "every rank needs a graph of its own; use another release of torch"
            )
        setattr(config, name, False)


def mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """One graph is to serve any size of this dimension, if it can."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)
