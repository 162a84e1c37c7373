"""Exceptions at every call that a function makes into this package or a model, one at a time."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import torch
from torch import nn

import adarank_fast
import adarank_kernels
from adarank_fast.adapters import fused_linear
from adarank_fast.models import forward_patching

OURS = tuple(
    f"{Path(package.__file__).parent}{os.sep}" for package in (adarank_fast, adarank_kernels)
)
ERRORS: tuple[type[BaseException], ...] = (KeyboardInterrupt, RuntimeError)
MODELS = f"{os.sep}transformers{os.sep}models{os.sep}"


@cache
def is_counted(file: str, function: str) -> bool:
    return file.startswith(OURS) or (function == "forward" and MODELS in file)


def is_thrown(frame: FrameType) -> bool:
    """Whether a context manager goes on because of an exception.

    There Python 3.11 leaves a generator without its `finally` if a trace function raises, and looks
    for no signal: nothing real can end it there.
    """
    back = frame.f_back
    return (
        back is not None
        and back.f_code.co_filename == contextlib.__file__
        and back.f_code.co_name == "__exit__"
        and back.f_locals.get("typ") is not None
    )


class Calls:
    """Counts the calls of a function that runs in the context; raises `error` at call `at`."""

    def __init__(self, at: int = 0, error: BaseException | None = None) -> None:
        self.count, self.at, self.error = 0, at, error

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and is_counted(code.co_filename, code.co_name) and not is_thrown(frame):
            self.count += 1
            if self.count == self.at and self.error is not None:
                raise self.error

    def __enter__(self) -> Calls:
        gc.disable()  # a collection may call what it frees, sooner or later
        self._before, self._hook = sys.gettrace(), sys.unraisablehook
        sys.unraisablehook = lambda _: None  # an exception in a weak reference's callback
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        sys.unraisablehook = self._hook
        gc.enable()


def every(count: int, shift: int) -> Iterator[int]:
    """Calls to fail at: all, or FAULTS of them (5 by default), evenly spread over `count`."""
    wanted = os.environ.get("FAULTS", "5")
    number = count if wanted == "all" else min(int(wanted), count)
    for index in range(number):
        yield 1 + (index * count + shift * count // 3) // number % count


def state_of(model: nn.Module) -> list[tuple[str, Any]]:
    """Everything that a fault could leave behind: of the model, of the process, of this thread."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = dict(vars(module))
        for key, value in attributes.items():
            if isinstance(value, dict):  # children, parameters, buffers, hooks
                found.append((f"{name}.{key}", [(k, id(v)) for k, v in value.items()]))
            else:
                same = isinstance(value, (bool, int, float, str, list))
                found.append((f"{name}.{key}", copy.copy(value) if same else id(value)))
        found.append((f"{name}'s class", type(module)))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        kept = (tensor.requires_grad, tensor.data_ptr(), tensor.grad, sorted(vars(tensor)))
        found.append((f"{name}'s state", kept))
        found.append((f"{name}'s value", tensor.detach().clone().view(torch.uint8).tolist()))
    dynamo = torch._dynamo.config
    found += [
        ("fast path", torch.backends.mha.get_fastpath_enabled()),
        ("gradients", (torch.is_grad_enabled(), torch.is_inference_mode_enabled())),
        ("modes", torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
        ("predicted", len(forward_patching._undisturbed)),
        ("compiler", dynamo.force_parameter_static_shapes),
        ("compiler", dynamo.force_nn_module_property_static_shapes),
        ("filters", list(warnings.filters)),
    ]
    return found


def differences(before: list[tuple[str, Any]], after: list[tuple[str, Any]]) -> list[str]:
    pairs = zip(before, after, strict=False)
    odd = [f"{name}: {one} is now {two}" for (name, one), (_, two) in pairs if one != two]
    return odd if len(before) == len(after) else [*odd, f"{len(after) - len(before)} more"]


@dataclass(frozen=True)
class Case:
    """A public function on a model.

    Attributes:
        make: a fresh model.
        call: the function under test.
        found: what there is to compare in its result.
        use: a forward of the model.
        same: whether two values of `found`, or of `use`, agree.
    """

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module], Any]
    found: Callable[[Any], Any]
    use: Callable[[nn.Module], Any]
    same: Callable[[Any, Any], bool]


class Undisturbed:
    """What `call(make())` gives, what the model then gives, and how many calls it makes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.expected, self.working = case.found(case.call(case.make())), case.use(case.make())
        model = case.make()
        case.use(model)
        with Calls() as calls:
            case.call(model)
        self.calls = calls.count

    def fail(self, at: int, error: type[BaseException]) -> bool:
        """Raise `error` at a call; whether that ended the function.

        Afterwards the model is as it was and can be used, and a second call gives what an
        undisturbed one does; a call that goes on in spite of an exception gives that, too.
        """
        case, model = self.case, self.case.make()
        case.use(model)
        before = state_of(model)
        try:
            with Calls(at, error(f"call {at}")):
                result = case.call(model)
        except BaseException as caught:
            assert caught.args == (f"call {at}",) or not issubclass(error, KeyboardInterrupt), (
                caught
            )
            assert not isinstance(caught, AssertionError), caught
            # while it is handled: its traceback keeps every frame that it went through
            odd = differences(before, state_of(model))
            assert not odd, (at, self.calls, odd[:3])
            run = fused_linear.thread.run
            assert run is None or all("_adarank" in vars(layer) for layer in run.layers)
        else:
            found = case.found(result)
            assert case.same(found, self.expected), f"call {at}: caught, and another result"
            return False
        assert case.same(case.use(model), self.working), f"call {at}: another output of the model"
        again = case.found(case.call(model))
        assert case.same(again, self.expected), f"call {at}: another result of the second call"
        return True


def check(case: Case, error: type[BaseException]) -> tuple[int, int]:
    """Fail at calls of a case: (calls there are, those that ended it)."""
    undisturbed = Undisturbed(case)
    at = every(undisturbed.calls, issubclass(error, Exception))
    return undisturbed.calls, sum(undisturbed.fail(one, error) for one in at)


def soak(
    cases: Mapping[str, Case], seconds: float, seed: int = 0, most: float = float("inf")
) -> dict[str, Any]:
    """Fail at calls in random order, each case in turn; all of them, once, with time."""
    random, deadline = Random(seed), time.monotonic() + seconds
    counts: dict[str, Any] = {"raised": 0, "ended the call": 0, "calls": 0}
    faults: list[str] = []
    left: list[tuple[str, Undisturbed, list[tuple[int, type[BaseException]]]]] = []
    for name, case in cases.items():
        undisturbed = Undisturbed(case)
        counts["calls"] += undisturbed.calls
        at = [(one, error) for one in range(1, undisturbed.calls + 1) for error in ERRORS]
        random.shuffle(at)
        left.append((name, undisturbed, at))
    while left and counts["raised"] < most and time.monotonic() < deadline:
        name, undisturbed, at = left.pop(0)
        call, error = at.pop()
        if at:
            left.append((name, undisturbed, at))
        try:
            counts["ended the call"] += undisturbed.fail(call, error)
        except (Exception, error) as fault:
            faults.append(f"{name}, {error.__name__} at call {call}: {fault!r}")
        counts["raised"] += 1
    return counts | {"faults": faults}
