"""Jobs killed at random moments, and on a disk that fails: the same command finishes the work."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

NAMES = ("predict", "train", "compare", "export", "save")
MEASURED = ("seconds", "date", "memory_bytes", "per_second")  # differ from run to run
LIMIT = 200.0  # seconds of a job

Counts = dict[str, Any]


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_measured(v) for k, v in value.items() if not k.endswith(MEASURED)}
    return [_without_measured(v) for v in value] if isinstance(value, list) else value


def result(files: dict[str, bytes]) -> dict[str, Any]:
    """Of what a job wrote, that which is the same in every run: all but the times and pages."""
    found: dict[str, Any] = {}
    for name, content in files.items():
        if name.endswith(".json"):
            try:
                found[name] = _without_measured(json.loads(content))
            except ValueError:  # cut off in the middle, under a temporary name or in a checkpoint
                found[name] = content
        elif name.endswith((".html", ".md", ".png")) and "report" in name:
            found[name] = bool(content)
        else:
            found[name] = content
    return found


def differing(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


class Place:
    """Runs jobs in processes that a warm one forks, each in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.number = root, 0
        self.context = multiprocessing.get_context("forkserver")
        (root / "inputs").mkdir()
        self.whole: dict[str, dict[str, Any]] = {}  # what an undisturbed run wrote
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}  # that write
        self.largest: dict[str, int] = {}  # file, in bytes

    def folder(self) -> Path:
        self.number += 1
        made = self.root / str(self.number)
        made.mkdir()
        return made

    def run(
        self,
        name: str,
        folder: Path,
        fault: Any = None,
        older: bool = False,
        kill_after: float | None = None,
    ) -> tuple[int | None, str]:
        """Run a job to its end, or kill it after some seconds: (exit status, stderr)."""
        from tests.reliability.jobs import work

        read, write = self.context.Pipe(duplex=False)
        process = self.context.Process(target=work, args=(name, folder, write, fault, older))
        process.start()
        write.close()
        try:
            process.join(LIMIT if kill_after is None else kill_after)
        finally:
            process.kill()
            process.join()
        said = b""
        while part := os.read(read.fileno(), 1 << 16):
            said += part
        read.close()
        return process.exitcode, said.decode(errors="replace")

    def measure(self, name: str) -> None:
        """Run a job undisturbed: its files, its time, its calls."""
        from tests.reliability.jobs import Fault

        if name in self.whole:
            return
        runs = []
        for fault in (Fault(), None):  # the first one is cold, and counts
            folder = self.start(name)
            started = time.monotonic()
            status, said = self.run(name, folder, fault)
            self.seconds[name] = time.monotonic() - started
            assert status == 0, said
            if fault:
                self.calls[name] = int(said.rpartition("calls: ")[2])
            files = listing(folder)
            self.largest[name] = max(map(len, files.values()))
            runs.append(result(files))
            shutil.rmtree(folder)
        odd = differing(*runs)
        assert not odd, f"{name}: two undisturbed runs differ in {odd}"
        self.whole[name] = runs[0]

    def start(self, name: str) -> Path:
        """A folder with the older result in it, if the job replaces one."""
        from tests.reliability.jobs import JOBS

        folder = self.folder()
        if JOBS[name].before is not None:
            older = self.root / f"older-{name}"
            if not older.exists():
                older.mkdir()
                status, said = self.run(name, older, older=True)
                assert status == 0, said
            shutil.copytree(older, folder, dirs_exist_ok=True)
        return folder

    def harmed(self, name: str, before: dict[str, bytes], now: dict[str, bytes]) -> list[str]:
        """Files of before that are neither as they were nor the new ones, whole."""
        moved = {k.split("/")[0]: k for k in now if k.endswith(".old") or ".old/" in k}
        odd = []
        for path, content in before.items():
            found = now.get(path)
            if found is None and moved:  # between two renames; the next run puts it back
                inner = path.partition("/")[2]
                found = next(
                    (now[f"{top}/{inner}"] for top in moved if f"{top}/{inner}" in now), None
                )
            if found == content:
                continue
            new = None if found is None else result({path: found}).get(path)
            if name == "save" and found:  # one of twelve
                continue
            if new is None or new != self.whole[name].get(path):
                odd.append(path)
        return odd

    def kept(self, name: str, folder: Path) -> dict[str, bytes]:
        from tests.reliability.jobs import JOBS

        paths = [path for pattern in JOBS[name].kept for path in folder.glob(pattern)]
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in paths
            if path.is_file() and not path.name.startswith(".")
        }

    def finish(self, name: str, folder: Path, kept: dict[str, bytes]) -> list[str]:
        """Run the job again to its end: what differs from an undisturbed run, or was lost."""
        if result(listing(folder)) == self.whole[name]:
            return []  # whole already; a second `export` would refuse to touch it
        status, said = self.run(name, folder)
        if status != 0:
            return [f"{name}: resumed, it ends with {status}: {said[-600:]}"]
        files = listing(folder)
        faults = []
        if odd := differing(result(files), self.whole[name]):
            faults.append(f"{name}: resumed, other files than undisturbed: {odd[:5]}")
        lost = [
            path
            for path, content in kept.items()
            if not files.get(path, b"").startswith(content[: content.rfind(b"\n") + 1] or content)
        ]
        if lost:
            faults.append(f"{name}: finished work lost: {lost[:5]}")
        return faults


@contextmanager
def place() -> Iterator[Place]:
    """A `Place` in a temporary folder; its warm process has the jobs' modules imported."""
    roots = os.pathsep.join(str(Path(__file__).parents[2] / part) for part in ("", "kernels"))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = roots
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = Place(Path(folder))
            made.context.set_forkserver_preload(["tests.reliability.jobs"])
            from tests.reliability.jobs import make_inputs

            maker = made.context.Process(target=make_inputs, args=(made.root / "inputs",))
            maker.start()
            maker.join()
            assert maker.exitcode == 0
            yield made
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def kills(
    here: Place,
    seconds: float,
    seed: int = 0,
    most: float = float("inf"),
    names: tuple[str, ...] = NAMES,
) -> Counts:
    """SIGKILL at random moments of the jobs, once or twice, each then run to its end."""
    random, deadline = Random(seed), time.monotonic() + seconds
    counts: Counts = {"kills": 0} | {f"killed in {name}": 0 for name in names} | {"resumed": 0}
    faults: list[str] = []
    for name in names:
        here.measure(name)
    while counts["kills"] < most and time.monotonic() < deadline:
        name = names[counts["resumed"] % len(names)]
        folder = here.start(name)
        before = listing(folder)
        kept: dict[str, bytes] = {}
        for _ in range(random.choice((1, 1, 2))):
            after = random.uniform(0, here.seconds[name])
            status, said = here.run(name, folder, kill_after=after)
            if status == -9:
                counts["kills"] += 1
                counts[f"killed in {name}"] += 1
            elif status != 0:
                faults.append(f"{name}: ended with {status} before its kill: {said[-600:]}")
            if odd := here.harmed(name, before, listing(folder)):
                faults.append(f"{name}: killed after {after:.3f} s: harmed {odd[:5]}")
            kept |= here.kept(name, folder)
            if result(listing(folder)) == here.whole[name]:
                break  # killed when it was done; a second `export` would refuse its folder
        faults += here.finish(name, folder, kept)
        counts["resumed"] += 1
        shutil.rmtree(folder)
    return counts | {"faults": faults}


def full_disk(
    here: Place,
    seconds: float,
    seed: int = 0,
    most: float = float("inf"),
    names: tuple[str, ...] = NAMES,
) -> Counts:
    """The n-th write fails, or files cannot grow: one line, nothing harmed, the next run is right.

    Every write of every job, once on a full disk and once on a read-only one, in random order;
    after every fourth, files that cannot grow beyond a random size. A job that leaves the files of
    an earlier fault is not run again: that was seen to give the right ones.
    """
    from tests.reliability.jobs import Fault

    random, deadline = Random(seed), time.monotonic() + seconds
    for name in names:
        here.measure(name)
    left = [
        (name, Fault(at, number))
        for name in names
        for at in range(1, here.calls[name] + 1)
        for number in (errno.ENOSPC, errno.EROFS)
    ]
    for _ in range(len(left) // 4):
        name = random.choice(names)
        left.append((name, Fault(largest=int(here.largest[name] * random.random() ** 3))))
    random.shuffle(left)
    counts: Counts = {"disk faults": 0} | {f"failed in {name}": 0 for name in names}
    counts["all disk faults"] = len(left)
    counts["writes"] = sum(here.calls.values())
    faults: list[str] = []
    finished: list[tuple[str, dict[str, Any]]] = []  # from which files, without what is measured
    while left and counts["disk faults"] < most and time.monotonic() < deadline:
        name, fault = left.pop()
        folder = here.start(name)
        before = listing(folder)
        status, said = here.run(name, folder, fault)
        lines = [line for line in said.splitlines() if line.startswith("adarank: error: ")]
        if status == 2 and len(lines) == 1 and "Traceback" not in said:
            counts[f"failed in {name}"] += 1
        elif status != 0:
            faults.append(f"{name}: {fault}: ended with {status}: {said[-1500:]}")
        if odd := here.harmed(name, before, listing(folder)):
            faults.append(f"{name}: {fault}: harmed {odd[:5]}")
        files = name, result(listing(folder))
        if files not in finished:
            odd = here.finish(name, folder, here.kept(name, folder))
            faults += odd
            finished += [] if odd else [files]
        shutil.rmtree(folder)
        counts["disk faults"] += 1
    return counts | {"faults": faults}
