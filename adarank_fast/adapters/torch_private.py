"""All that the adapters use of torch's compiler that is no public interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adarank_fast.errors import AdarankRuntimeError

_COMPILED = "_compiled_call_impl"
Function = TypeVar("Function", bound=Callable[..., Any])


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` or `module.compile()` was called."""
    return hasattr(module, "_orig_mod") or getattr(module, _COMPILED, None) is not None


def undo_compile(modules: Sequence[nn.Module]) -> Callable[[], None]:
    """A function that undoes later calls of `module.compile()`."""
    before = [(m, {k: v for k, v in vars(m).items() if k == _COMPILED}) for m in modules]

    def undo() -> None:
        for module, attributes in before:
            vars(module).pop(_COMPILED, None)
            vars(module).update(attributes)

    return undo


def constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, without importing the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def parameter_shape_settings() -> dict[str, bool]:
    """Whether the compiler takes parameters' shapes as constants, process-wide: its two settings.

    Raises:
        AdarankRuntimeError: this torch has no such setting.
    """
    config = torch._dynamo.config
    settings = {}
    for name in ("force_parameter_static_shapes", "force_nn_module_property_static_shapes"):
        if not hasattr(config, name):
            raise AdarankRuntimeError(
                f"torch {torch.__version__} has no torch._dynamo.config.{name}, without which "
                "every rank needs a graph of its own; use another release of torch"
            )
        settings[name] = bool(getattr(config, name))
    return settings


def set_parameter_shape_settings(settings: dict[str, bool]) -> None:
    """As `parameter_shape_settings` returns them; False: variable where a shape is marked."""
    for name, value in settings.items():
        setattr(torch._dynamo.config, name, value)


def mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """One graph is to serve any size of this dimension, if it can."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def free_generator(device: torch.device) -> None:
    """Give torch's generator of a CUDA device a state of its own if a broken capture holds it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    try:
        torch.rand(1, device=device)
    except RuntimeError:
        generator.graphsafe_set_state(generator.clone_state())


def in_backward() -> bool:
    """Whether a backward pass is under way in this thread."""
    return torch._C._current_graph_task_id() != -1
