"""Interleaved timings, and what they say: medians and bootstrap intervals."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from adarank_fast.models.memory import LiveBytes

Step = Callable[[], object]
Statistic = Callable[[list[dict[str, float]]], float]  # of medians, name -> seconds, a row each
Seconds = dict[str, list[float]]  # of every repetition of every variant
DRAWS = 1000
LONGEST = 45.0  # seconds, about


def interleaved(
    names: Iterable[str],
    seconds_of: Callable[[str], float],
    repetitions: int,
    limit: float = math.inf,
) -> Seconds:
    """Time every variant once a repetition, in an order drawn anew, for at most `limit` seconds."""
    order, shuffle = list(names), random.Random(time.time_ns())
    seconds: Seconds = {name: [] for name in order}
    began = time.perf_counter()
    for _ in range(repetitions):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(seconds_of(name))
        if time.perf_counter() - began > limit:
            break
    return seconds


def timed(
    steps: Mapping[str, Step],
    repetitions: int,
    limit: float = LONGEST,
    clock: Callable[[], float] | None = None,
    device: torch.device | None = None,
    warm_up: int = 2,
) -> Seconds:
    """Seconds of the steps, interleaved, after `warm_up` calls of each.

    Args:
        steps: what is timed.
        repetitions: of every step.
        limit: seconds after which no other repetition begins.
        clock: in seconds; None: `event_seconds` on a GPU, else `time.perf_counter`.
        device: where the steps run; None: the CPU.
        warm_up: calls that are not timed.
    """
    on_gpu = device is not None and device.type == "cuda" and clock is None
    now = clock or time.perf_counter

    def seconds_of(name: str) -> float:
        if on_gpu:
            return event_seconds(steps[name])
        start = now()
        steps[name]()
        return now() - start

    for step in [*steps.values()] * warm_up:
        step()
    return interleaved(steps, seconds_of, repetitions, limit)


def event_seconds(run: Step) -> float:
    """Seconds of one call between two CUDA events, from an idle card: launches are part of it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def peak_bytes(run: Step, device: torch.device) -> int:
    """Most bytes that one call holds beyond what was held before it.

    Of the allocator on a GPU; elsewhere of the tensors that operations make, counted.
    """
    if device.type != "cuda":
        with LiveBytes() as live:
            run()
        return int(live.peak)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - held)


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Name -> median, in seconds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def bootstrap(
    seconds: Sequence[Mapping[str, Sequence[float]]],
    statistic: Callable[[list[dict[str, float]]], float],
    draws: int = DRAWS,
) -> tuple[float, float, float]:
    """A statistic of the medians, and its 95% interval; repetitions are drawn together.

    Args:
        seconds: of each row; in a row all variants have as many repetitions.
        statistic: of the medians of each row.
        draws: how often the repetitions are drawn anew, with replacement.

    Returns:
        Value, low, high.
    """
    state = random.Random(0)

    def value(pick: Callable[[int], Sequence[int]]) -> float:
        rows = []
        for row in seconds:
            chosen = pick(min(map(len, row.values())))
            rows.append(medians({n: [values[i] for i in chosen] for n, values in row.items()}))
        return statistic(rows)

    drawn = sorted(value(lambda n: state.choices(range(n), k=n)) for _ in range(draws))
    return value(range), drawn[draws // 40], drawn[-1 - draws // 40]


def overhead_ratio(
    rows: Sequence[Mapping[str, Seconds]], ours: str, theirs: str, draws: int = DRAWS
) -> dict[str, float | list[float]]:
    """Sum over rows of our median overhead / theirs, with a 95% bootstrap interval."""

    def ratio(rows: list[dict[str, float]]) -> float:
        mine, other = (sum(row[name] - row["frozen"] for row in rows) for name in (ours, theirs))
        return mine / other if other else math.inf

    names = ("frozen", ours, theirs)
    seconds = [{name: row["seconds"][name] for name in names} for row in rows]
    value, low, high = bootstrap(seconds, ratio, draws)
    return {"ratio": value, "interval": [low, high]}
