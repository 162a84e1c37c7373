"""Give modules another `forward` for a while, and put a model into a state fit for probing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
TensorForward = Callable[..., Tensor]  # of linear layers
Patch = Callable[[Forward], Forward]  # a module's forward so far -> the one to use


class StopForward(BaseException):
    """Raised by a patch once the rest of a pass is not needed.

    No Exception, so that a model's own `except Exception` lets it pass.
    """


class ForwardPatches:
    """Patches of modules' forwards, stacked: each gets the forward that those before it made.

    A patch may call what it gets, and so wrap it, or leave it, and so replace it.

    Args:
        layers: module -> patch, from the inside out.
    """

    def __init__(self, *layers: Mapping[nn.Module, Patch]) -> None:
        self._forwards: dict[nn.Module, Forward] = {}
        for layer in layers:
            for module, patch in layer.items():
                self._forwards[module] = patch(self._forwards.get(module, module.forward))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The modules with their patches; without them again at the end, whatever happens."""
        before = {module: module.__dict__.get("forward") for module in self._forwards}
        try:
            for module, forward in self._forwards.items():
                module.forward = forward
            yield
        finally:
            for module, forward_before in before.items():
                if forward_before is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = forward_before


def stop_before(_: Forward) -> Forward:
    """A patch: the pass ends where the module would run."""

    def stopping(*args: Any, **kwargs: Any) -> Any:
        raise StopForward

    return stopping


def stop_after(forward: Forward) -> Forward:
    """A patch: the module runs, and the pass ends there."""

    def stopping(*args: Any, **kwargs: Any) -> Any:
        forward(*args, **kwargs)
        raise StopForward

    return stopping


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, every module's own forward; all as before at the end.

    `torch.nn.TransformerEncoder` in eval mode reads weights without calling its modules until the
    fast path of `torch.backends.mha` is off.
    """
    training = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def flags_restored(model: nn.Module) -> Iterator[None]:
    """Which parameters require gradients may change meanwhile; it is as before at the end."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
