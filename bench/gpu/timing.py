"""Interleaved timings with a timer to choose: CUDA events, or those of replayed graphs.

`torch.cuda` is ROCm's too. "eager" times are taken from an idle card, so launches are part of them;
"graph" times have none.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adarank_fast.adapters.torch_private import free_generator
from adarank_fast.benchmarking import measure
from adarank_fast.benchmarking.measure import event_seconds, interleaved

Outputs = Iterable[Tensor] | None
OUT_OF_MEMORY = "out of memory"


def nothing() -> None:
    pass


@dataclass
class Step:
    """What is timed: `run` does it `calls` times; `before` is not timed (kernels, old gradients).

    A `run` that does a part of it has fewer than one call: its time is extrapolated.

    `run` returns what it wrote, or None where it adds into its operands: a captured graph is only
    believed if a replay writes those tensors again. `captured` False: it waits for the card itself.
    """

    run: Callable[[], Outputs]
    before: Callable[[], None] = nothing
    calls: float = 1
    captured: bool = True


class Timer(Protocol):
    name: str

    def ready(self, step: Step) -> Callable[[], object]:
        """Warm up; what to time."""

    def seconds(self, run: Callable[[], object]) -> float: ...


class Events:
    """CUDA events around each run."""

    name = "eager"

    def ready(self, step: Step) -> Callable[[], object]:
        for _ in range(3):
            step.before()
            step.run()
        torch.cuda.synchronize()
        return step.run

    def seconds(self, run: Callable[[], object]) -> float:
        return event_seconds(run)


class Host(Events):
    """The host's clock until the last launch is issued: the card's own time is no part of it."""

    name = "host"

    def ready(self, step: Step) -> Callable[[], object]:
        for _ in range(3):
            step.before()
            step.run()
        return step.run

    def seconds(self, run: Callable[[], object]) -> float:
        wait()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def wait() -> None:
    """For all that was launched, where there is a card."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Graphs(Events):
    """CUDA events around the replay of a captured graph."""

    name = "graph"

    def __init__(self) -> None:
        # One stream to warm up and to capture on: gradient accumulators remember theirs. One pool
        # for the graphs of a row, which are replayed one at a time and share no results; it lives
        # as long as they do.
        self.stream = torch.cuda.Stream()
        self.graphs: list[Any] = []

    def ready(self, step: Step) -> Callable[[], object]:
        if not step.captured:
            raise ValueError("a step that waits for the card cannot be captured")
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                step.before()
                step.run()
        outside.wait_stream(self.stream)
        torch.cuda.synchronize()
        step.before()  # no gradients: the capture allocates its own, at fixed addresses
        graph = torch.cuda.CUDAGraph()
        pool = self.graphs[0].pool() if self.graphs else None
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                written = step.run()
        except Exception:
            torch.cuda.set_stream(outside)  # a capture that breaks off does not
            self.stream, self.graphs = torch.cuda.Stream(), []
            free_generator(torch.device("cuda", torch.cuda.current_device()))
            raise
        self.graphs.append(graph)
        self._believe(graph, [] if written is None else list(written))
        return graph.replay

    @staticmethod
    def _believe(graph: Any, written: list[Tensor]) -> None:
        """A replay must write every floating output anew: work that was not captured shows."""
        floating = [tensor for tensor in written if tensor.is_floating_point()]
        with torch.no_grad():
            for tensor in floating:
                tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        if not all(bool(tensor.isfinite().all()) for tensor in floating):
            raise ArithmeticError("a replay of its graph leaves outputs unwritten")


def timed(
    steps: dict[str, Step], repetitions: int, timer: Timer, limit: float = math.inf
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds a call of every repetition of every step, interleaved; why others failed.

    A step that cannot be prepared is left out with its reason. After `limit` seconds no other
    repetition begins.
    """
    runs: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for name, step in steps.items():
        try:
            runs[name] = timer.ready(step)
        except Exception as error:  # the others are still worth timing
            failed[name] = reason(error)
            release()

    def seconds_of(name: str) -> float:
        steps[name].before()
        return timer.seconds(runs[name]) / steps[name].calls

    return interleaved(runs, seconds_of, repetitions, limit), failed


def reason(error: BaseException) -> str:
    """One line: "out of memory", or what went wrong."""
    if isinstance(error, torch.OutOfMemoryError) or any(
        said in str(error) for said in ("CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    ):
        return OUT_OF_MEMORY
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def refusal(check: Callable[[], object]) -> str | None:
    """The status of what must not be timed because its check raised."""
    try:
        check()
    except Exception as error:
        release()
        why = reason(error)
        return why if why == OUT_OF_MEMORY else f"check failed: {why}"
    return None


def release() -> None:
    """Give back what a row held; raises if the card no longer answers."""
    gc.collect()
    wait()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """Most memory allocated during one run beyond what was allocated before; None on the CPU."""
    if device.type != "cuda":
        return None
    peak = 0
    for _ in range(2):
        step.before()
        peak = measure.peak_bytes(step.run, device)
    return peak


def copies(size: int, device: torch.device) -> int:
    """How many sets of operands of `size` bytes to go through so that none waits in the cache."""
    if device.type != "cuda":
        return 1
    # ROCm reports the second-level cache; its cards may have a larger one behind it
    known = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    cache = max(known, (256 if torch.version.hip else 64) << 20)
    return max(1, min(32, -(-2 * cache // size)))


def rotating(op: Callable[..., Any], operands: list[tuple[Any, ...]], **kwargs: Any) -> Step:
    """`op` on each set of operands in turn."""

    def run() -> Outputs:
        found: list[Tensor] = []
        for each in operands:
            result = op(*each)
            found += [result] if isinstance(result, Tensor) else list(result or ())
        return found

    return Step(run, calls=len(operands), **kwargs)
