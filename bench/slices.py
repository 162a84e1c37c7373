"""Benchmarks in slices: each run goes on where the last one stopped, a row at a time.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adarank_fast.files import replacing

ROOT = Path(__file__).parent.parent
Step = Callable[[], None]
Row = dict[str, Any]  # "seconds": variant -> list; and whatever else was found out once


@dataclass
class Slices:
    """The rows of one benchmark, finished or not."""

    name: str
    keys: Sequence[str]
    repetitions: int
    sources: Iterable[Path]
    rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for path in sorted(self.sources):
            digest.update(path.read_bytes())
        self.path = ROOT / ".benchmarks" / f"{self.name}-{digest.hexdigest()[:12]}.json"
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())

    def missing(self, key: str) -> int:
        """Repetitions that a row still needs."""
        seconds = self.rows.get(key, {}).get("seconds", {})
        return self.repetitions - min((len(values) for values in seconds.values()), default=0)

    def run(self, steps_of: Callable[[str], tuple[dict[str, Step], Row]], limit: float) -> bool:
        """Measure the first unfinished row for about `limit` seconds; whether any is left."""
        key = next((key for key in self.keys if self.missing(key) > 0), None)
        if key is None:
            return False
        steps, once = steps_of(key)
        seconds = interleaved(steps, self.missing(key), limit)
        row = self.rows.setdefault(key, {"seconds": {name: [] for name in steps}})
        row.update(once)
        for name, values in seconds.items():
            row["seconds"][name] += values
        self.path.parent.mkdir(exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.rows))
        print(f"{key}: {self.repetitions - self.missing(key)} of {self.repetitions} repetitions")
        print("   " + describe(row["seconds"]), flush=True)
        return any(self.missing(key) > 0 for key in self.keys)


def interleaved(steps: dict[str, Step], repetitions: int, limit: float) -> dict[str, list[float]]:
    """Seconds of every repetition of every variant, whole repetitions within the limit."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(time.time_ns())
    for step in [*steps.values()] * 2:
        step()
    began = time.perf_counter()
    for _ in range(repetitions):
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
        if time.perf_counter() - began > limit:
            break
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def describe(seconds: dict[str, list[float]]) -> str:
    """The frozen step, and what each variant takes beyond it."""
    middle = medians(seconds)
    base = middle["frozen"]
    rest = [f"{n} {v / base - 1:+.3f}" for n, v in middle.items() if n != "frozen"]
    return f"frozen {base * 1e3:.2f} ms; beyond it: " + ", ".join(rest)


def ratio_interval(
    rows: list[Row], ours: str, theirs: str, draws: int = 1000
) -> tuple[float, float, float]:
    """Sum over rows of our median overhead / theirs, with a 95% bootstrap interval."""
    random_state = random.Random(0)

    def ratio(pick: Callable[[int], list[int]]) -> float:
        sums = {ours: 0.0, theirs: 0.0}
        for row in rows:
            chosen = pick(len(row["seconds"]["frozen"]))
            picked = {
                name: [row["seconds"][name][i] for i in chosen] for name in ("frozen", ours, theirs)
            }
            middle = medians(picked)
            for name in sums:
                sums[name] += middle[name] - middle["frozen"]
        return sums[ours] / sums[theirs]

    drawn = sorted(ratio(lambda n: random_state.choices(range(n), k=n)) for _ in range(draws))
    return ratio(lambda n: list(range(n))), drawn[draws // 40], drawn[-1 - draws // 40]


def arguments(description: str, repetitions: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repetitions", type=int, default=repetitions, help="a row")
    parser.add_argument("--slices", type=int, default=0, help="stop after so many (0: all rows)")
    parser.add_argument("--seconds", type=float, default=45.0, help="timing a slice, about")
    return parser


def kernel_sources() -> list[Path]:
    """What every LoRA benchmark depends on."""
    return [
        *ROOT.glob("kernels/adarank_kernels/*.py"),
        *(ROOT / "adarank_fast" / name for name in ("fused.py", "groups.py", "adapters.py")),
        Path(__file__),
    ]
