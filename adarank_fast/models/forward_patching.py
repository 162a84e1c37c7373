"""Give modules another `forward` for a while, and put a model into a state fit for probing."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from adarank_fast.errors import AdarankError
from adarank_fast.undo import undone

Forward = Callable[..., Any]
TensorForward = Callable[..., Tensor]  # of linear layers
Patch = Callable[[Forward], Forward]  # a module's forward so far -> the one to use


class StopForward(BaseException):
    """Raised by a patch once the rest of a pass is not needed.

    No Exception, so that a model's own `except Exception` lets it pass.
    """


class ForwardPatches:
    """Patches of modules' forwards, stacked: each gets the forward that those before it made.

    A patch may call what it gets, and so wrap it, or leave it, and so replace it. It is given a
    forward's first argument by position, also where the model names it (`linear(input=x)`).

    Args:
        layers: module -> patch, from the inside out.
    """

    def __init__(self, *layers: Mapping[nn.Module, Patch]) -> None:
        self._forwards: dict[nn.Module, Forward] = {}
        for layer in layers:
            for module, patch in layer.items():
                self._forwards[module] = patch(self._forwards.get(module, module.forward))
        for module, forward in self._forwards.items():
            self._forwards[module] = _first_by_position(_first_name(type(module).forward), forward)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The modules with their patches; without them again at the end, whatever happens."""
        before = {module: module.__dict__.get("forward") for module in self._forwards}

        def undo() -> None:
            for module, forward in before.items():
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward

        with undone(undo):
            for module, forward in self._forwards.items():
                module.__dict__["forward"] = forward
            yield


@cache
def _first_name(forward: Forward) -> str | None:
    """The name of the first argument of a class's `forward`, if it can be given by name."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:2]
    except (TypeError, ValueError):  # not written in Python
        return None
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return named[0] if named else None


def _first_by_position(name: str | None, forward: Forward) -> Forward:
    def forward_by_position(*args: object, **kwargs: object) -> object:
        if not args and name in kwargs:
            args = (kwargs.pop(name),)
        return forward(*args, **kwargs)

    return forward_by_position


def stop_before(_: Forward) -> Forward:
    """A patch: the pass ends where the module would run."""

    def stopping(*args: object, **kwargs: object) -> object:
        raise StopForward

    return stopping


def stop_after(forward: Forward) -> Forward:
    """A patch: the module runs, and the pass ends there."""

    def stopping(*args: object, **kwargs: object) -> object:
        forward(*args, **kwargs)
        raise StopForward

    return stopping


_lock = threading.Lock()
_undisturbed: dict[object, set[nn.Module]] = {}  # the modules of each call that has not ended
_fast_path = True  # what torch's setting was before the first of them


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, every module's own forward; all as before at the end.

    `torch.nn.TransformerEncoder` in eval mode reads weights without calling its modules until the
    fast path of `torch.backends.mha` is off. That is a setting of the whole process: it is off
    while any thread is in here, and as before when the last one leaves.

    Raises:
        AdarankError: a model, or one that shares a module with it, is in here already.
    """
    global _fast_path
    modules = {module for model in models for module in model.modules()}
    training: list[tuple[nn.Module, bool]] = []
    call = object()

    def undo() -> None:
        with _lock:
            if call not in _undisturbed:
                return
            for module, mode in training:
                module.training = mode
            if len(_undisturbed) == 1:
                torch.backends.mha.set_fastpath_enabled(_fast_path)
            del _undisturbed[call]  # last: until then all of it can be done again

    with undone(undo):
        with _lock:
            if any(not modules.isdisjoint(others) for others in _undisturbed.values()):
                names = ", ".join(type(model).__name__ for model in models)
                raise AdarankError(
                    f"{names} is being predicted or compared already, in this thread or another; "
                    "wait for it, or give each call a copy (copy.deepcopy)"
                )
            if not _undisturbed:
                _fast_path = torch.backends.mha.get_fastpath_enabled()
            _undisturbed[call] = modules
            torch.backends.mha.set_fastpath_enabled(False)
            training = [(module, module.training) for module in modules]
        for model in models:
            model.eval()
        with torch.inference_mode(False), torch.no_grad():
            yield


@contextmanager
def flags_restored(model: nn.Module) -> Iterator[None]:
    """Restore at the end which parameters require gradients."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def undo() -> None:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    with undone(undo):
        yield
