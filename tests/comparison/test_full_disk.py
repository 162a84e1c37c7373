"""A full disk and a read-only folder at every writer: one line, nothing lost, nothing left."""

from __future__ import annotations

import errno
import io
import os
import resource
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

import adarank_fast as ada
from adarank_fast.adapters.merge import merge_adapter
from adarank_fast.cli.train import train as train_command
from adarank_fast.files import own_folder, write_text
from tests.comparison.comparisons import run
from tests.tiny_models import tiny
from tests.tiny_texts import save_tiny

LIMIT = 64  # bytes of a file


@pytest.fixture(scope="module")
def made(tmp_path_factory, finished):
    """What there is to write: a plan, a model folder, an adapter folder, a report."""
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny("llama", folder / "model")
    adapted().save_pretrained(folder / "adapter")
    plan = ada.RankPlan.uniform(tiny("bert"), 2)
    (folder / "texts.txt").write_text("one two three\nfour five")
    return dict(
        plan=plan,
        model=str(model),
        adapter=folder / "adapter",
        report=finished[1],
        texts=folder / "texts.txt",
    )


def adapted():
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny("llama", layers=2), config)


def train(made, path):
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):  # pytest's are files
        train_command(
            model=str(made["model"]),
            data=made["texts"],
            output_folder=path,
            rank=2,
            max_steps=1,
        )


FILES = {
    "text": lambda made, path: write_text(path, "new" * LIMIT),
    "plan": lambda made, path: made["plan"].save(path),
    "trainer's settings": lambda made, path: ada.export_plan(made["plan"], path, "axolotl"),
    "picture": lambda made, path: ada.plot_plan(made["plan"], path),
}
FOLDERS = {
    "export": lambda made, path: ada.export_uniform(adapted(), path),
    "merge": lambda made, path: merge_adapter(made["model"], made["adapter"], path),
    "report": lambda made, path: made["report"].save(path),
    "comparison": lambda made, path: run(("uniform",), 1, work_dir=path, learning_rates=(1e-2,)),
    "train": train,
}


def files(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@contextmanager
def fault(kind, monkeypatch):
    """`limit`: no file can grow beyond `LIMIT`, whoever writes. Others: of a system call."""
    if kind == "limit":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
        try:
            yield "File too large"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    number = errno.EROFS if kind in ("open", "mkdir") else errno.ENOSPC

    original = getattr(os, kind)

    def failing(*arguments, **options):
        reads = kind == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR)
        if reads or "pytest" not in str(arguments[0]) and kind != "fsync":
            return original(*arguments, **options)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, kind, failing)
        yield os.strerror(number)


@pytest.mark.parametrize("writer", FILES)
@pytest.mark.parametrize("kind", ["limit", "fsync", "replace", "open"])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_file(made, tmp_path, monkeypatch, writer, kind, before):
    path = tmp_path / "file.png"
    if before:
        path.write_text(before)
    there = files(tmp_path)
    with fault(kind, monkeypatch) as message:
        with pytest.raises(ada.AdarankError, match=f"cannot write '{path}': {message}") as raised:
            FILES[writer](made, path)
    assert isinstance(raised.value, OSError) and "\n" not in str(raised.value)
    assert files(tmp_path) == there and len(os.listdir(tmp_path)) == len(there)


KINDS = ["limit", "fsync", "mkdir", "replace"]
# merging writes a progress bar, into a file of pytest's; training makes a folder of its own
LEFT_OUT = [("merge", "limit"), ("train", "mkdir")]


@pytest.mark.parametrize(
    "writer, kind",
    [(w, kind) for w in FOLDERS for kind in KINDS if (w, kind) not in LEFT_OUT],
)
def test_a_folder(made, tmp_path, monkeypatch, writer, kind):
    path = tmp_path / "new"
    with fault(kind, monkeypatch) as message:
        with pytest.raises(ada.AdarankError, match=f"cannot write .*: {message}") as raised:
            FOLDERS[writer](made, path)
    assert isinstance(raised.value, OSError) and "\n" not in str(raised.value)
    left = {p.name for p in tmp_path.rglob("*")}
    assert not [name for name in left if name.endswith((".tmp", ".old"))]
    if writer in ("export", "merge"):
        assert not left
    FOLDERS[writer](made, path)  # nothing stands in the way of the next try
    assert files(path)


@pytest.mark.parametrize("kind", ["limit", "fsync", "replace"])
def test_a_report_of_before_survives(made, tmp_path, monkeypatch, kind):
    made["report"].save(tmp_path)
    there = files(tmp_path)
    with fault(kind, monkeypatch), pytest.raises(ada.AdarankError, match="cannot write"):
        made["report"].save(tmp_path)
    changed = {p.name for p, content in files(tmp_path).items() if there.get(p) != content}
    assert changed <= {"settings.json"} and files(tmp_path).keys() <= there.keys()


def test_a_mark_that_cannot_be_written(tmp_path, monkeypatch):
    for kind in ("open", "mkdir"):
        with fault(kind, monkeypatch) as message:
            with pytest.raises(ada.AdarankError, match=f"cannot write .*: {message}"):
                with own_folder(tmp_path / kind, "x"):
                    pass
        with own_folder(tmp_path / kind, "x"):
            pass
