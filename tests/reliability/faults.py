"""Exceptions at every call that a function makes into this package or a model, one at a time."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any, NamedTuple

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


class Site(NamedTuple):
    """A place that calls, and what it calls."""

    file: str
    line: int
    callee: CodeType


class Calls:
    """Counts the calls of a function that runs in the context; raises `error` at call `at`.

    Attributes:
        sites: of the calls, in their order, if `note` is set.
    """

    def __init__(self, at: int = 0, error: BaseException | None = None, note: bool = False) -> None:
        self.count, self.at, self.error, self.note = 0, at, error, note
        self.sites: list[Site] = []

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and is_counted(code.co_filename, code.co_name) and not is_thrown(frame):
            self.count += 1
            if self.note:
                caller = frame.f_back
                assert caller is not None
                self.sites.append(Site(caller.f_code.co_filename, caller.f_lineno, code))
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
    """Calls to fail at: all, or FAULTS of them (3 by default), evenly spread over `count`."""
    wanted = os.environ.get("FAULTS", "3")
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
        found.append((f"{name}'s value", tensor.detach().view(torch.uint8).numpy().tobytes()))
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
        function: a whole run fails once at a call site of all cases of the same function.
    """

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module], Any]
    found: Callable[[Any], Any]
    use: Callable[[nn.Module], Any]
    same: Callable[[Any, Any], bool]
    function: str


class Undisturbed:
    """What `call(make())` gives, what the model then gives, and how many calls it makes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.expected, self.working = case.found(case.call(case.make())), case.use(case.make())
        model = case.make()
        case.use(model)
        with Calls(note=True) as calls:
            case.call(model)
        self.calls, self.sites = calls.count, calls.sites

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


Trial = tuple[int, type[BaseException]]  # a call, what is raised at it


def of_sites(
    sites: Sequence[Site], random: Random, seen: Set[Site] = frozenset()
) -> tuple[list[int], list[int]]:
    """The first call of each site but those `seen`; its last one, and one in between at random."""
    calls: dict[Site, list[int]] = {}
    for number, site in enumerate(sites, start=1):
        if site not in seen:
            calls.setdefault(site, []).append(number)
    more = [some[-1] for some in calls.values() if len(some) > 1]
    more += [random.choice(some[1:-1]) for some in calls.values() if len(some) > 2]
    return [some[0] for some in calls.values()], more


class Left:
    """What is still to be tried of a case: at the sites, then elsewhere, each part shuffled."""

    def __init__(self, case: Case, random: Random, seen: set[Site]) -> None:
        self.undisturbed = Undisturbed(case)
        self.first, more = of_sites(self.undisturbed.sites, random, seen)
        seen.update(self.undisturbed.sites)
        others = {*range(1, self.undisturbed.calls + 1)} - {*self.first, *more}
        parts = [[(n, error) for n in part for error in ERRORS] for part in (self.first, more)]
        self.of_sites = sum(map(len, parts))
        parts.append([(n, error) for n in sorted(others) for error in ERRORS])
        for part in parts:
            random.shuffle(part)
        self.trials = deque(trial for part in parts for trial in part)
        self.done: set[Trial] = set()

    def sites(self) -> int:
        """At how many sites every error was raised."""
        return sum(all((n, error) in self.done for error in ERRORS) for n in self.first)


def soak(
    cases: Mapping[str, Case], seconds: float, seed: int = 0, most: float = float("inf")
) -> dict[str, Any]:
    """Fail at calls of each case in turn: at every call site, and then elsewhere.

    At a site every error is raised at the first call, at the last, and at one in between, in the
    first case of a function that comes by. After that it goes on with other calls until `most` were
    raised, if there is time.
    """
    random, deadline = Random(seed), time.monotonic() + seconds
    seen = {case.function: set[Site]() for case in cases.values()}
    every_case = {name: Left(case, random, seen[case.function]) for name, case in cases.items()}
    ended, faults = 0, list[str]()
    turns = deque(every_case.items())
    while turns and time.monotonic() < deadline:
        name, left = turns.popleft()
        raised = sum(len(one.done) for one in every_case.values())
        if not left.trials or (len(left.done) >= left.of_sites and raised >= most):
            continue
        call, error = trial = left.trials.popleft()
        turns.append((name, left))
        try:
            ended += left.undisturbed.fail(call, error)
        except (Exception, error) as fault:
            site = left.undisturbed.sites[call - 1]
            where = f"{site.callee.co_qualname} from {Path(site.file).name}:{site.line}"
            faults.append(f"{name}, {error.__name__} at call {call}, {where}: {fault!r}")
        left.done.add(trial)
    found = every_case.values()
    return {
        "call sites": sum(left.sites() for left in found),
        "all call sites": sum(len(left.first) for left in found),
        "raised": sum(len(left.done) for left in found),
        "ended the function": ended,
        "calls": sum(left.undisturbed.calls for left in found),
        "faults": faults,
    }
