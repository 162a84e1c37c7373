"""Tries for a long time what the tests of this folder try for seconds, and notes the figures.

    python -m tests.reliability.soak                    (hours: each arm until its goal)
    python -m tests.reliability.soak --minutes 20       (the arms share the time)
    python -m tests.reliability.soak --only kills --minutes 5 --seed 7

or `make soak MINUTES=20 ARGS="--only kills"`. Each arm is a process of its own, ended if it
hangs. The figures go to bench/results/reliability.json, of which docs/reliability.md is made. Exits
with 1 if anything was found, after all arms have run.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any

from bench.pages import write_page
from bench.reliability_page import ARMS, PAGE, page
from bench.results_file import read_results, write_results

ROOT = Path(__file__).parents[2]
HOURS = 4.0  # of an arm, if no time is given
GRACE = 600.0  # seconds beyond its time after which an arm is taken to hang
SHOWN = 5  # faults that are kept in words
LONG = 2000  # characters of one

Counts = dict[str, Any]


def kills(seconds: float, seed: int, goal: float) -> Counts:
    from tests.reliability import cutting

    with cutting.place() as here:
        return cutting.kills(here, seconds, seed, most=goal)


def disk(seconds: float, seed: int, goal: float) -> Counts:
    from tests.reliability import cutting

    with cutting.place() as here:
        return cutting.full_disk(here, seconds, seed, most=goal)


def exceptions(seconds: float, seed: int, goal: float) -> Counts:
    from tests.reliability import fault_cases, faults

    return faults.soak(fault_cases.CASES, seconds, seed, most=goal)


def inputs(seconds: float, seed: int, goal: float) -> Counts:
    from tests.reliability.test_mutations import mutate_forever

    count, faults = mutate_forever(seconds, seed, most=goal)
    return {"changed files": count, "faults": faults}


def growth(seconds: float, seed: int, goal: float) -> Counts:
    from tests.reliability import growth

    return growth.soak(seconds, seed, steps=goal, predictions=goal / 10)


def threads(seconds: float, seed: int, goal: float) -> Counts:
    from tests.reliability import serving

    return serving.soak(seconds, seed, most=goal / serving.THREADS / serving.REQUESTS)


def processes(seconds: float, seed: int, goal: float) -> Counts:
    from tests.reliability import sameness

    return sameness.soak(seconds, seed, most=goal)


@dataclass(frozen=True)
class Arm:
    """One kind of trial.

    Attributes:
        run: takes seconds, a seed and a goal; returns counts and `faults`, in words.
        goal: how many trials of its kind are enough without a limit of time; fewer than what the
            arm must do anyway: that.
        share: of the time that all arms have.
        in_memory: temporary files are written by the million, and need not reach a disk.
    """

    run: Callable[[float, int, float], Counts]
    goal: float
    share: float
    in_memory: bool = False


SOAKS = {  # the longest first, for two at a time
    "kills": Arm(kills, 200, 0.25),
    "disk": Arm(disk, float("inf"), 0.2),
    "growth": Arm(growth, 20_000, 0.15),
    "exceptions": Arm(exceptions, 0, 0.15),
    "inputs": Arm(inputs, 1_000_000, 0.1, in_memory=True),
    "processes": Arm(processes, 50, 0.1),
    "threads": Arm(threads, 20_000, 0.05),
}


class Running:
    """An arm in a process of its own, which is the first of its group."""

    def __init__(self, name: str, seconds: float, seed: int, timed: bool, temporary: Path) -> None:
        self.name, self.started = name, time.monotonic()
        self.limit = seconds + GRACE
        self.result, self.said = temporary / "result.json", temporary / "stderr"
        (temporary / "work").mkdir()
        roots = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = {"TMPDIR": str(temporary / "work"), "PYTHONPATH": roots}
        options = ["--seconds", str(seconds), "--seed", str(seed), *(["--timed"] if timed else [])]
        module = ["-m", "tests.reliability.soak", "--arm", name, "--result", str(self.result)]
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, *module, *options],
                cwd=ROOT,
                env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def ended(self) -> bool:
        late = time.monotonic() - self.started > self.limit + 30  # it ends itself, with its stack
        return late or self.process.poll() is not None

    def end(self) -> None:
        """Kill what is left of the group."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def row(self) -> Counts:
        if self.result.exists():
            counts = json.loads(self.result.read_text())
        else:
            said = self.said.read_text(errors="replace")[-LONG:]
            status = self.process.returncode
            counts = {"faults": [f"the arm ended with {status} and no result: {said}"]}
        faults = counts.pop("faults")
        return {
            "counts": counts,
            "faults": len(faults),
            "shown": [fault[:LONG] for fault in faults[:SHOWN]],
            "minutes": (time.monotonic() - self.started) / 60,
        }


def run(names: list[str], minutes: float | None, seed: int, jobs: int) -> dict[str, Counts]:
    """Run arms, some at a time: a row of each."""
    waiting, running, rows = list(names), list[Running](), dict[str, Counts]()
    shares = sum(SOAKS[name].share for name in names)
    with ExitStack() as stack:
        stack.callback(lambda: [one.end() for one in running])
        while waiting or running:
            while waiting and len(running) < jobs:
                arm = SOAKS[name := waiting.pop(0)]
                seconds = HOURS * 3600
                if minutes is not None:
                    seconds = minutes * 60 * min(1.0, jobs * arm.share / shares)
                memory = arm.in_memory and os.access("/dev/shm", os.W_OK)
                folder = tempfile.TemporaryDirectory(
                    dir="/dev/shm" if memory else None, ignore_cleanup_errors=True
                )
                temporary = Path(stack.enter_context(folder))
                running.append(Running(name, seconds, seed, minutes is not None, temporary))
                say(f"{name}: begins; {seconds / 60:.1f} minutes at most")
            for one in [one for one in running if one.ended()]:
                one.end()
                running.remove(one)
                rows[one.name] = row = one.row() | {"seed": seed}
                counted = ", ".join(f"{count:,} {what}" for what, count in row["counts"].items())
                say(f"{one.name}: {row['minutes']:.1f} minutes; {counted}; faults: {row['faults']}")
                for fault in row["shown"]:
                    say(f"  FAULT {fault}")
            time.sleep(0.2)
    return rows


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def is_kept(name: str, old: Counts | None, new: Counts) -> bool:
    """Whether a row replaces an older one: if it tried as much, or one of the two has a fault."""
    if old is None or new["faults"] or old["faults"]:
        return True
    _, key, _ = ARMS[name]
    return bool(new["counts"][key] >= old["counts"].get(key, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, help="of all arms together")
    parser.add_argument("--only", nargs="+", choices=SOAKS, default=list(SOAKS), metavar="ARM")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(2**31))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    for name in ("--arm", "--result", "--seconds"):  # of the process of one arm
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        seconds, arm = float(given.seconds), SOAKS[given.arm]
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True)
        counts = arm.run(seconds, given.seed, float("inf") if given.timed else arm.goal)
        Path(given.result).write_text(json.dumps(counts))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what runs is ended on the way out
    say(f"seed {given.seed}: {', '.join(given.only)}")
    rows = run(given.only, given.minutes, given.seed, max(1, given.jobs))
    before = read_results("reliability")
    kept = {n: row for n, row in rows.items() if is_kept(n, before.get(n), row)}
    write_results("reliability", kept)
    write_page(PAGE, page())
    if found := sum(row["faults"] for row in rows.values()):
        sys.exit(f"{found} faults")
    say("no fault")


if __name__ == "__main__":
    main()
