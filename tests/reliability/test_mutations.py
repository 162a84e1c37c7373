"""Every reader of files takes a file or refuses it with one line, soon, whatever is in it.

ADARANK_MUTATIONS=1000000 runs that many changed files; `mutate_forever` is the same for a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adarank_fast as ada
from adarank_fast.adapters import patterns
from adarank_fast.adapters.adapter_files import read_adapter
from adarank_fast.adapters.export import export_saved
from adarank_fast.plan.rank_plan import RankPlan, Score
from adarank_fast.plan.trainer_formats import render
from adarank_fast.prediction.checkpoint import Checkpoint
from adarank_fast.training.data import read_data
from tests.reliability import mutations
from tests.reliability.mutations import Change

EXAMPLES = int(os.environ.get("ADARANK_MUTATIONS", "400"))
MOST_SECONDS = 5.0


@dataclass(frozen=True)
class Reader:
    """A reader, and a file that it takes.

    Attributes:
        name: of the file within its folder.
        read: takes the folder, and uses what it read.
        structure: changes the file's structure; None: only bytes are changed.
    """

    name: str
    read: Callable[[Path], object]
    structure: Change | None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 3)}) for _ in range(2)
        )


def read_plan(folder: Path) -> None:
    plan = RankPlan.load(folder / "plan.json")
    plan.table()
    plan.save(folder / "again.json")
    assert RankPlan.load(folder / "again.json") == plan
    for use in (render, lambda one: one.allocate(2)):
        with contextlib.suppress(ada.AdarankError):  # a plan may have no rank above 0, or no scores
            use(plan)


def read_checkpoint(folder: Path) -> None:
    with Checkpoint(folder / "checkpoint", {"seed": 0}):
        pass


def read_folder(folder: Path) -> None:
    adapter = read_adapter(folder / "adapter")
    try:
        export_saved(adapter, Net(), folder / "served")
    finally:
        shutil.rmtree(folder / "served", ignore_errors=True)


def texts(name: str) -> Callable[[Path], object]:
    return lambda folder: read_data(folder / name)


READERS = {
    "plan": Reader("plan.json", read_plan, mutations.change_json),
    "checkpoint": Reader("checkpoint", read_checkpoint, mutations.change_lines),
    "config": Reader("adapter/adapter_config.json", read_folder, mutations.change_json),
    "tensors": Reader("adapter/adapter_model.safetensors", read_folder, mutations.change_tensors),
    "jsonl": Reader("texts.jsonl", texts("texts.jsonl"), mutations.change_lines),
    "csv": Reader("texts.csv", texts("texts.csv"), None),
    "tsv": Reader("texts.tsv", texts("texts.tsv"), None),
    "txt": Reader("texts.txt", texts("texts.txt"), None),
}


def make_samples(folder: Path) -> dict[str, bytes]:
    """A valid file for each reader, in `folder`: name -> content."""
    net = Net()
    names = {f"layers.{i}.{kind}": (4, 4 - (kind == "v")) for i in range(2) for kind in "qv"}
    scores = {n: Score.from_trials([0.1 * i + 0.5, 1.0 + i]) for i, n in enumerate(names)}
    made = dict(average_rank=2, allocation="exact", metric="l1", base_model_prefix="bert.")
    plan = RankPlan(dict(zip(names, (1, 2, 2, 3), strict=True)), names, scores, made)
    plan.save(folder / "plan.json")
    with Checkpoint(folder / "checkpoint", {"seed": 0}) as checkpoint:
        checkpoint.add({("layers.0.q", 0): 0.25, ("layers.1.v", 1): 1e-3})
    ada.inject(net, plan).save_pretrained(folder / "adapter")
    rows = [{"text": f"word {i}, \u00e9", "label": i % 2} for i in range(3)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, comma in (("texts.csv", ","), ("texts.tsv", "\t")):
        lines = (f'"a ""{row["label"]}"""{comma}{row["label"]}' for row in rows)
        (folder / name).write_text("\n".join([f"text{comma}label", *lines]))
    (folder / "texts.txt").write_text("one\ntwo\n\u00e9\n", encoding="utf-8")
    return {reader.name: (folder / reader.name).read_bytes() for reader in READERS.values()}


def judge(reader: Reader, folder: Path) -> str | None:
    """What is wrong with how a reader takes what is in `folder`; None: nothing."""
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder)
    except ada.AdarankError as error:
        message = str(error)
        if not message.isprintable() or not message or len(message) > 3000:
            return f"not one line: {message[:3000]!r}"
    except Exception:
        return traceback.format_exc(limit=-6)
    seconds = time.perf_counter() - started
    return f"took {seconds:.1f} s" if seconds > MOST_SECONDS else None


def try_one(random: Random, name: str, folder: Path, samples: dict[str, bytes]) -> str | None:
    """Change a reader's file, judge the reader, and put the file back."""
    reader = READERS[name]
    path, sample = folder / reader.name, samples[reader.name]
    path.write_bytes(mutations.change(random, sample, reader.structure))
    try:
        if fault := judge(reader, folder):
            return f"{name}: {path.read_bytes()[:2000]!r}\n{fault}"
        return None
    finally:
        path.write_bytes(sample)


@contextlib.contextmanager
def workplace() -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A folder in memory where there is one, the valid files in it, and little time for patterns.

    What is found beyond the limit of a pattern's time is no other if the limit is shorter.
    """
    place = os.environ.get("TMPDIR") or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    before = patterns.SECONDS
    patterns.SECONDS = 0.1
    try:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            yield Path(folder), make_samples(Path(folder))
    finally:
        patterns.SECONDS = before


def mutate_forever(
    seconds: float = float("inf"), seed: int = 0, most: float = float("inf")
) -> tuple[int, list[str]]:
    """Change files and judge their readers for a time: (how many, faults of different places)."""
    random, deadline = Random(seed), time.monotonic() + seconds
    faults: dict[str, str] = {}
    count = 0
    with workplace() as (folder, samples):
        names = list(READERS)
        while count < most and time.monotonic() < deadline:
            if fault := try_one(random, names[count % len(names)], folder, samples):
                faults.setdefault("".join(fault.splitlines()[-3:]), fault)
            count += 1
    return count, list(faults.values())


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Path, dict[str, bytes]]]:
    with workplace() as made:
        yield made


@pytest.mark.parametrize("name", READERS)
def test_the_valid_file_is_taken(place, name):
    READERS[name].read(place[0])


def test_changed_files(place):
    folder, samples = place

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(name=st.sampled_from(list(READERS)), random=st.randoms(use_true_random=False))
    def run(name, random):
        fault = try_one(random, name, folder, samples)
        assert fault is None, fault

    run()


def test_changed_files_of_a_plain_generator():
    count, faults = mutate_forever(seed=1, most=EXAMPLES)
    assert count == EXAMPLES
    assert not faults, "\n\n".join(faults)


def test_other_things_than_files(place):
    folder, samples = place
    for reader in READERS.values():
        path = folder / reader.name
        for content in (None, b"", b"\xff\xfe\x00", b"null", b"[]", b"{}", b"\x00" * 64):
            path.unlink()
            path.mkdir() if content is None else path.write_bytes(content)
            try:
                fault = judge(reader, folder)
            finally:
                path.rmdir() if content is None else path.unlink()
                path.write_bytes(samples[reader.name])
            assert fault is None, fault
        path.unlink()
        assert judge(reader, folder) is None
        path.write_bytes(samples[reader.name])
