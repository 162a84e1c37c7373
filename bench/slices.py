"""Interleaved timings of training steps, in slices: each run goes on where the last one stopped.

Timings of every row are kept in .benchmarks/, in a file named after a hash of the sources that they
depend on, so that a changed kernel or benchmark starts anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from adarank_fast.benchmarking.measure import Step, medians, timed
from bench.results_file import write_json, write_results

ROOT = Path(__file__).parent.parent
SOURCES = ("kernels/adarank_kernels/**/*.py", "kernels/adarank_kernels/runtime/cpp/*")
SOURCES += ("adarank_fast/adapters/*.py", "bench/blocks.py", "bench/slices.py")
SOURCES += ("adarank_fast/benchmarking/measure.py", "adarank_fast/benchmarking/arms.py")
Row = dict[str, Any]  # "seconds", and whatever else was found out once


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
