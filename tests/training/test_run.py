"""`adarank train` from arguments to folder: a run that was cut off, what it remembers, its result."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import adarank_fast as ada
from adarank_fast.adapters import fusion_report
from adarank_fast.training import run as running
from adarank_fast.training import trainer as training
from tests.tiny_models import VOCABULARY, tiny
from tests.tiny_texts import EXAMPLES, WORDS, save_tiny, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models, and data of each form."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("bert", "llama"):
        save_tiny(kind, root / kind)
    for count in (2, 3, 50):
        names = [f"{'class'} {i % count}" for i in range(max(60, count))]
        rows = [f"{EXAMPLES[i % 60][0]},{name}" for i, name in enumerate(names)]
        (root / f"{count}.csv").write_text("\n".join(["text,label", *rows]))
    rows = [{"prompt": text, "completion": f" {WORDS[i]}"} for i, (text, _) in enumerate(EXAMPLES)]
    (root / "completion.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


TASKS = {
    "classification": ("bert", "2.csv"),
    "language model": ("llama", "completion.jsonl"),
}
OPTIONS = (
    *("--rank", 2, "--epochs", 3, "--batch-size", 8, "--learning-rate", "1e-2"),
    *("--lora-dropout", 0.1, "--set", "gradient_accumulation_steps=2", "--set", "save_steps=2"),
)


def command(folder, task, *more):
    model, data = TASKS[task]
    return ("train", folder / model, "--data", folder / data, *OPTIONS, *more)


def cut_after(monkeypatch, step):
    """The process is interrupted at the end of a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(running.Progress, "on_step_end", on_step_end)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(adarank, folder, monkeypatch, task):
    more = ("--eval-data", folder / TASKS[task][1], "--early-stopping", 9)
    assert adarank(*command(folder, task, *more, "-o", "whole"))[0] == 0
    with monkeypatch.context() as patch:
        cut_after(patch, 7)
        assert adarank(*command(folder, task, *more, "-o", "cut"))[0] == 130
    assert not Path("cut").exists() and list(Path(".cut.unfinished").glob("checkpoint-6"))
    status, _, err = adarank(*command(folder, task, *more, "-o", "cut", "--max-steps", 9))
    assert status == 2 and "holds an unfinished run with settings = " in err
    steps = []
    monkeypatch.setattr(training.Watch, "on_step_begin", lambda *a, **k: steps.append(1))
    monkeypatch.setattr(training.Watch, "_started", 0.0, raising=False)
    assert adarank(*command(folder, task, *more, "-o", "cut"))[0] == 0
    whole, cut = Path("whole"), Path("cut")
    for name in ("adapter_model.safetensors", "plan.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    records = [json.loads((one / "training.json").read_text()) for one in (whole, cut)]
    assert records[0] == records[1] and len(steps) < records[0]["steps"] == 12
    assert {path.name for path in Path().iterdir()} == {"whole", "cut"}


def test_a_run_that_diverged_before_it_was_cut_off_is_not_saved(adarank, folder, monkeypatch):
    batch = training.Watch.batch
    with monkeypatch.context() as patch:
        cut_after(patch, 7)
        patch.setattr(training.Watch, "batch", lambda s, loss, x: batch(s, 0.1 * loss, x))
        assert adarank(*command(folder, "classification"))[0] == 130
    status, _, err = adarank(*command(folder, "classification"))
    assert status == 2 and "training loss rose from 0.0" in err  # 0.69 / 10
    assert not list(Path().iterdir())


def test_a_run_that_goes_on_with_other_products_says_so(adarank, folder, monkeypatch):
    with monkeypatch.context() as patch:
        cut_after(patch, 7)
        patch.setattr(training, "products", lambda model: "Triton")
        assert adarank(*command(folder, "classification"))[0] == 130
    with pytest.warns(UserWarning, match="this run began with products = Triton and goes on with"):
        assert adarank(*command(folder, "classification"))[0] == 0


def test_a_broken_checkpoint_is_passed_over(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({}))
    (tmp_path / "checkpoint-4").mkdir()
    assert running.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()
