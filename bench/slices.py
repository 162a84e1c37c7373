"""Interleaved timings of training steps, in slices: each run goes on where the last one stopped.

Timings of every row are kept in .benchmarks/, in a file named after a hash of the sources that they
depend on, so that a changed kernel or benchmark starts anew. Every repetition times every variant
once, in an order drawn anew, so that a row may be measured in several slices.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from adarank_fast.files import replacing

ROOT = Path(__file__).parent.parent
SOURCES = ("kernels/adarank_kernels/**/*.py", "kernels/adarank_kernels/runtime/cpp/*")
SOURCES += ("adarank_fast/adapters/*.py", "bench/blocks.py", "bench/slices.py")
Step = Callable[[], None]
Clock = Callable[[], float]
Seconds = dict[str, list[float]]  # of every repetition of every variant
Row = dict[str, Any]  # "seconds", and whatever else was found out once


def arguments(description: str, repetitions: int) -> argparse.ArgumentParser:
    """What every benchmark of training steps can be told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repetitions", type=int, default=repetitions, help="a row")
    parser.add_argument("--slices", type=int, default=0, help="stop after so many (0: all rows)")
    parser.add_argument("--only", default="", help="rows named so; no file is written")
    parser.add_argument("--seconds", type=float, default=45.0, help="timing a slice, about")
    return parser


class Slices:
    """The rows of one benchmark, finished or not."""

    def __init__(
        self, name: str, keys: Iterable[str], options: argparse.Namespace, source: str
    ) -> None:
        self.keys, self.options = list(keys), options
        digest = hashlib.sha256(Path(source).read_bytes())
        for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
            digest.update(path.read_bytes())
        self.path = ROOT / ".benchmarks" / f"{name}-{digest.hexdigest()[:12]}.json"
        self.rows: dict[str, Row] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def finish(self, steps_of: Callable[[str], tuple[dict[str, Step], Row]]) -> dict[str, Row]:
        """Measure what is missing, as many slices as asked for; the rows if all are finished.

        Args:
            steps_of: a row's variants, checked, and what else there is to know of the row.
        """
        done = 0
        while unfinished := [key for key in self.keys if self._missing(key)]:
            if done and done == self.options.slices:
                finished = len(self.keys) - len(unfinished)
                print(f"{finished} of {len(self.keys)} rows finished; run again to go on")
                return {}
            self._measure(unfinished[0], *steps_of(unfinished[0]))
            done += 1
        return {key: self.rows[key] for key in self.keys}

    def _missing(self, key: str) -> int:
        seconds = self.rows.get(key, {}).get("seconds", {})
        done = min(map(len, seconds.values()), default=0)
        return max(self.options.repetitions - done, 0)

    def _measure(self, key: str, steps: dict[str, Step], once: Row) -> None:
        seconds = interleaved(steps, self._missing(key), self.options.seconds)
        row = self.rows.setdefault(key, {"seconds": {name: [] for name in steps}})
        row.update(once)
        for name, values in seconds.items():
            row["seconds"][name] += values
        self.path.parent.mkdir(exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.rows))
        asked = self.options.repetitions
        print(f"{key}: {asked - self._missing(key)} of {asked} repetitions")
        print("   " + describe(row["seconds"]), flush=True)


def interleaved(
    steps: dict[str, Step], repetitions: int, limit: float, clock: Clock = time.perf_counter
) -> Seconds:
    """Seconds of every repetition of every variant, whole repetitions within the limit."""
    seconds: Seconds = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(time.time_ns())
    for step in [*steps.values()] * 2:
        step()
    began = time.perf_counter()
    for _ in range(repetitions):
        shuffle.shuffle(order)
        for name in order:
            start = clock()
            steps[name]()
            seconds[name].append(clock() - start)
        if time.perf_counter() - began > limit:
            break
    return seconds


def medians(seconds: Seconds) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def describe(seconds: Seconds) -> str:
    """The frozen step, and what each variant takes beyond it."""
    middle = medians(seconds)
    base = middle["frozen"]
    rest = [f"{n} {v / base - 1:+.3f}" for n, v in middle.items() if n != "frozen"]
    return f"frozen {base * 1e3:.2f} ms; beyond it: " + ", ".join(rest)


def overhead_ratio(rows: Sequence[Row], ours: str, theirs: str, draws: int = 1000) -> Row:
    """Sum over rows of our median overhead / theirs, with a 95% bootstrap interval."""
    random_state = random.Random(0)

    def ratio(pick: Callable[[int], Sequence[int]]) -> float:
        sums = {ours: 0.0, theirs: 0.0}
        for row in rows:
            seconds = {name: row["seconds"][name] for name in ("frozen", ours, theirs)}
            chosen = pick(len(seconds["frozen"]))
            middle = medians({n: [values[i] for i in chosen] for n, values in seconds.items()})
            for name in sums:
                sums[name] += middle[name] - middle["frozen"]
        return sums[ours] / sums[theirs]

    drawn = sorted(ratio(lambda n: random_state.choices(range(n), k=n)) for _ in range(draws))
    return {"ratio": ratio(range), "interval": [drawn[draws // 40], drawn[-1 - draws // 40]]}
