"""Interleaved timings of training steps, in slices: each run goes on where the last one stopped.

Timings of every row are kept in .benchmarks/, in a file named after a hash of the sources that they
depend on, so that a changed kernel or benchmark starts anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.results_file import write_json, write_results

ROOT = Path(__file__).parent.parent
SOURCES = ("kernels/adarank_kernels/**/*.py", "kernels/adarank_kernels/runtime/cpp/*")
SOURCES += ("adarank_fast/adapters/*.py", "bench/blocks.py", "bench/slices.py")
SLICE = 45.0  # seconds, about
Step = Callable[[], object]
Seconds = dict[str, list[float]]  # of every repetition of every variant
Row = dict[str, Any]  # "seconds", and whatever else was found out once


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
    steps: dict[str, Step],
    repetitions: int,
    limit: float = SLICE,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Seconds of the steps, interleaved, after two calls of each."""

    def seconds_of(name: str) -> float:
        start = clock()
        steps[name]()
        return clock() - start

    for step in [*steps.values()] * 2:
        step()
    return interleaved(steps, seconds_of, repetitions, limit)


def arguments(description: str, repetitions: int) -> argparse.ArgumentParser:
    """What every benchmark of training steps can be told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repetitions", type=int, default=repetitions, help="a row")
    parser.add_argument("--slices", type=int, default=0, help="stop after so many (0: all rows)")
    parser.add_argument("--only", default="", help="rows named so; no file is written")
    return parser


class Slices:
    """The rows of one benchmark, finished or not."""

    def __init__(self, name: str, source: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        paths = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in (Path(source), *paths)))
        self.path = ROOT / ".benchmarks" / f"{name}-{digest.hexdigest()[:12]}.json"
        self.rows: dict[str, Row] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def finish(
        self,
        keys: Iterable[str],
        steps_of: Callable[[str], tuple[dict[str, Step], Row]],
        results: Callable[[dict[str, Row]], dict[str, Row]],
    ) -> None:
        """Measure what is missing, as many slices as asked for; once all is there, write it.

        Args:
            keys: the rows.
            steps_of: a row's variants, checked, and what else there is to know of the row.
            results: what the timings of all rows come to; printed, and the file's content.
        """
        keys, done = [key for key in keys if self.options.only in key], 0
        while unfinished := [key for key in keys if self._missing(key)]:
            if done and done == self.options.slices:
                print(f"{len(keys) - len(unfinished)} of {len(keys)} rows done; run again to go on")
                return
            self._measure(unfinished[0], *steps_of(unfinished[0]))
            done += 1
        found = results({key: self.rows[key] for key in keys})
        for key, row in found.items():
            told = {k: v for k, v in row.items() if "over" in k or key == "summary"}
            print(f"{key}: {told}")
        if not self.options.only:
            write_results(self.name, found, keep=False)

    def _missing(self, key: str) -> int:
        seconds = self.rows.get(key, {}).get("seconds", {})
        done = min(map(len, seconds.values()), default=0)
        return max(self.options.repetitions - done, 0)

    def _measure(self, key: str, steps: dict[str, Step], once: Row) -> None:
        row = self.rows.setdefault(key, {"seconds": {name: [] for name in steps}})
        row.update(once)
        for name, values in timed(steps, self._missing(key)).items():
            row["seconds"][name] += values
        write_json(self.path, self.rows)
        asked, middle = self.options.repetitions, medians(row["seconds"])
        base = middle.pop("frozen")
        beyond = ", ".join(f"{name} {value / base - 1:+.3f}" for name, value in middle.items())
        print(f"{key}: {asked - self._missing(key)} of {asked} repetitions")
        print(f"   frozen {base * 1e3:.2f} ms; beyond it: {beyond}", flush=True)


def medians(seconds: Seconds) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


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
