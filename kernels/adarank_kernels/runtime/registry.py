"""Which Triton kernels may run on which device: only those that have proved their numbers there.

A kernel registers a check. The first call that wants the kernel on a device runs the check (once;
it waits for the device). After a wrong number, a launch error or a missing compiler, PyTorch's own
operators are used instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

try:
    from triton import knobs

    HAS_TRITON = True
except ImportError:  # Windows, macOS
    HAS_TRITON = False

logger = logging.getLogger(__name__)

INTERPRETED = HAS_TRITON and bool(knobs.runtime.interpret)
DTYPES = (torch.bfloat16, torch.float16)  # float32 keeps the vendor's full-precision GEMMs
_checks: dict[str, Callable[[torch.device], None]] = {}
_waiting: set[str] = set()  # kernels of which no card has said whether they are faster
waiting_in_use: set[str] = set()  # of these, the ones that `choose` named
_status: dict[tuple[str, str], str] = {}
_compiled: dict[Hashable, tuple[Any, tuple[object, ...]]] = {}  # what `launch` has launched
_NOTHING: AbstractContextManager[object] = nullcontext()
_settled: dict[tuple[tuple[str, ...], torch.device, torch.dtype], frozenset[str]] = {}


def register(name: str, check: Callable[[torch.device], None], waits: bool = False) -> None:
    """Make a kernel known; `check(device)` raises where its numbers are wrong.

    One that `waits` for a card's verdict on its speed runs only where `choose` names it.
    """
    _checks[name] = check
    if waits:
        _waiting.add(name)


def choose(names: Collection[str], device: torch.device) -> None:
    """For benchmarks: from now on exactly these kernels run on the device, checked or not."""
    for name in _checks:
        _status[name, str(device)] = "passed" if name in names else "not chosen"
    waiting_in_use.clear()
    waiting_in_use.update(_waiting.intersection(names))
    _settled.clear()


def ready_among(names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> frozenset[str]:
    """The kernels among `names` that are `ready`; remembered once every check is through."""
    key = names, device, dtype
    found = _settled.get(key)
    if found is None:
        found = frozenset(name for name in names if ready(name, device, dtype))
        known = all(name in _waiting or (name, str(device)) in _status for name in names)
        if known and not INTERPRETED:
            _settled[key] = found
    return found


def ready(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernel `name` may run on tensors of `device` and `dtype`; checks it if need be."""
    if INTERPRETED:
        return dtype != torch.float64 and _status.get((name, str(device))) != "not chosen"
    if not HAS_TRITON or device.type != "cuda" or dtype not in DTYPES:
        return False
    if torch.compiler.is_compiling():
        return False  # in a graph, inductor fuses the plain torch form
    key = (name, str(device))
    if key not in _status:
        if name in _waiting:
            return False
        if torch.cuda.is_current_stream_capturing():
            return False  # the check synchronises
        try:
            with torch.cuda.device(device), torch.no_grad():
                _checks[name](device)
            _status[key] = "passed"
        except Exception as error:  # any failure means: not on this device
            _status[key] = f"failed: {type(error).__name__}: {error}"
            logger.warning("Triton kernel %s is not used on %s: %s", name, device, _status[key])
    return _status[key] == "passed"


def kernel_status(device: torch.device | str = "cuda") -> dict[str, str]:
    """Per kernel: "passed", "failed: why", "not checked yet", "not chosen", or why it never runs.

    Those reasons are "waits for a verdict" on its speed, and "no Triton".
    """
    if not HAS_TRITON:
        return dict.fromkeys(_checks, "no Triton")
    unknown = {n: "waits for a verdict" if n in _waiting else "not checked yet" for n in _checks}
    return {name: _status.get((name, str(device)), unknown[name]) for name in _checks}


def launch(
    kernel: Any,
    key: Hashable,
    grid: tuple[int, int],
    arguments: Sequence[object],
    constants: Mapping[str, object],
) -> None:
    """Run `kernel[grid](*arguments, **constants)`; Triton looks the kernel up the first time only.

    Triton's look-up reads every argument at every launch, which takes longer than a small kernel
    runs. Skipping it also skips Triton's hooks before a launch, and later changes of its debug
    knobs. On ROCm every launch is left to Triton, which also reads the sizes of storages there.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along both axes.
        arguments: tensors, integers and floats, in the kernel's order.
        key: with the constants, what settles all that Triton specialises on: the device, dtypes,
            which pointers start at 16 bytes, and `kind` of each integer.
        constants: the constexprs, which the kernel names last, and num_warps, num_stages.
    """
    if INTERPRETED or torch.version.hip:
        kernel[grid](*arguments, **constants)
        return
    key = id(kernel), key, tuple(constants.items())  # a kernel's own hash takes a lock
    found = _compiled.get(key)
    if found is not None:
        compiled, given = found
        compiled[grid[0], grid[1], 1](*arguments, *given)
        return
    compiled = kernel[grid](*arguments, **constants)
    if hasattr(compiled, "result"):  # compiled in the background
        compiled = compiled.result()
    if compiled is not None:
        given = tuple(constants[name] for name in kernel.arg_names if name in constants)
        _compiled[key] = compiled, given


def kind(value: int) -> tuple[bool, bool, bool]:
    """The property of an integer that Triton specialises a kernel on."""
    return value % 16 == 0, value == 1, value < 2**31


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Where to launch: Triton takes the current CUDA device, whatever the tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def cdiv(a: int, b: int) -> int:
    """The quotient of two integers, rounded up."""
    return -(-a // b)


def check_close(ours: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> None:
    """Raise unless the error against `exact` (float64) is at most twice torch's plus 1e-6."""
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (torchs.double() - exact).abs().max().item() + 1e-6
    if not error <= allowed:
        raise ArithmeticError(f"error {error:.3g} above {allowed:.3g}")
