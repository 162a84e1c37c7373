"""The GPU benchmark without a GPU: options, checks, runs, failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import checks, predictions, report, run, steps
from bench.gpu.__main__ import parse
from bench.gpu.context import Context, Row
from bench.gpu.rows import names
from tests.bench.gpu_benchmark import (
    TINY,
    TINY_OPS,
    TINY_PREDICTIONS,
    cpu_context,
    make_tiny,
    out_of_memory,
)

ROOT = Path(__file__).resolve().parents[2]


def test_options() -> None:
    options = parse([])
    assert (options.dtype, options.repetitions, options.out) == ("bfloat16", 50, None)
    assert options.jobs == names()
    rows = [name.partition(": ")[2] for name in names()]
    assert len(set(rows)) == len(rows)  # a row's name alone says who measures it
    options = parse(["--quick", "--dtype", "float16", "--only", "llama.*attention"])
    assert options.jobs == ["blocks: Llama-3-8B, attention"] and options.repetitions < 50
    assert parse(["--repetitions", "7"]).repetitions == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nonsense"], "'nonsense' matches none of: host: "),
        (["--only", "("], "is no regular expression"),
        (["--out", "missing/folder/file.json"], "its folder does not exist"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--repetitions", "0"], "must be at least 1, got 0"),
        (["--repetitions", "7", "--quick"], "not allowed with argument"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


def test_without_a_gpu_it_says_so_and_succeeds() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    hidden = {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--only", "ops"],
        cwd=ROOT,
        env=os.environ | hidden,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    assert done.stdout.startswith("no GPU here")
    assert f"timed {sum(n.startswith('ops') for n in names())} rows" in done.stdout


# Checks and runs on the CPU


def saved(context: Context, jobs: list[str]) -> tuple[int, dict[str, Any]]:
    found: dict[str, Any] = {}

    def save(checked: list, sections: dict, finished: bool) -> None:
        found.update(report.content({"card": "none"}, {}, checked, sections, finished))

    status = run.run(context, jobs, save, lambda text: None)
    return status, json.loads(json.dumps(found))


def test_everything_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch)
    context = cpu_context()
    status, found = saved(context, [*TINY, *TINY_OPS, *TINY_PREDICTIONS])
    assert found["failures"] == [] and status == 0 and found["finished"]
    assert {c["status"] for c in found["checks"]} == {"passed"}
    ops = {c["op"] for c in found["checks"]}
    assert ops == {
        "grouped_lora_linear",
        "lora_linear",
        "pairwise_disagreement",
        "philox_normal",
    }
    blocks = {row["variant"]: row for row in found["sections"]["blocks"]}
    assert blocks.keys() == {
        "frozen",
        "peft",
        "peft, float32 adapters",
        "ours, vendor GEMMs",
        "ours, float32 adapters, vendor GEMMs",
    }
    for name, row in blocks.items():
        assert row["repetitions"] == 3 and row["eager_seconds"] > 0, name
    for row in found["sections"]["kernels"]:
        timed = row["variant"] != "kernel"  # no card, no interpreter
        assert ("eager_seconds" in row) == timed == (row["status"] == "ok")
    assert all(row["eager_seconds"] > 0 for row in found["sections"]["ops"])
    predicted = [(row["row"], row["variant"]) for row in found["sections"]["predictions"]]
    assert predicted == [
        (name, variant)
        for name, probes in (("tiny writer", 4), ("tiny encoder", 16))
        for variant in (
            "one forward",
            f"naive loop, {probes} probes",
            "ours",
            "ours, blocks apart",
            "ours, 8 GiB",
            "ours, 32 GiB",
        )
    ]
    assert context.bandwidth and context.rate


def test_float32_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch)
    monkeypatch.setattr(run, "check_ops", lambda *args: iter(()))
    status, found = saved(cpu_context("float32"), ["blocks: tiny", "ops: tiny l1"])
    assert status == 0, found["failures"]
    variants = [row["variant"] for row in found["sections"]["blocks"]]
    assert variants == ["frozen", "peft", "ours, vendor GEMMs"]


def test_what_fails_its_check_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch)
    right = checks.grouped_lora_linear

    def wrong(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        return [y * 1.1 for y in right(*args, **kwargs)]

    monkeypatch.setattr(checks, "grouped_lora_linear", wrong)
    status, found = saved(cpu_context(), ["blocks: tiny"])
    assert status == 1
    rows = {row["variant"]: row for row in found["sections"]["blocks"]}
    assert "eager_seconds" in rows["peft"]
    ours = rows["ours, vendor GEMMs"]
    assert ours["status"].startswith("check failed") and "eager_seconds" not in ours
    assert any("grouped_lora_linear" in line and "error" in line for line in found["failures"])


def test_a_block_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_tiny(monkeypatch)
    monkeypatch.setattr(run, "check_ops", lambda *args: iter(()))
    accelerate = steps.ada.accelerate

    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "v.lora_B" in name:
                    parameter.mul_(1.5)
        return accelerate(model)

    monkeypatch.setattr(steps.ada, "accelerate", wrong)
    status, found = saved(cpu_context(), ["blocks: tiny"])
    ours = [row for row in found["sections"]["blocks"] if row["variant"].startswith("ours")]
    assert status == 1 and len(ours) == 2
    assert all("error" in row["status"] and "eager_seconds" not in row for row in ours)


def test_a_prediction_of_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch)
    monkeypatch.setattr(run, "check_ops", lambda *args: iter(()))
    loop = predictions.Problem.naive

    def other(*args: Any, **kwargs: Any) -> dict[str, float]:
        return {name: 1.001 * value for name, value in loop(*args, **kwargs).items()}

    monkeypatch.setattr(predictions.Problem, "naive", other)
    status, found = saved(cpu_context(), ["predictions: tiny writer"])
    rows = found["sections"]["predictions"]
    ours = [row for row in rows if row["variant"].startswith("ours")]
    others = [row for row in rows if row not in ours]
    assert status == 1 and others and all("eager_seconds" in row for row in others)
    assert all("error" in row["status"] and "eager_seconds" not in row for row in ours)


def test_a_row_without_memory_is_said_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_tiny(monkeypatch)
    monkeypatch.setattr(run, "check_ops", lambda *args: iter(()))
    monkeypatch.setattr(steps, "block_models", lambda *args: out_of_memory())
    status, found = saved(cpu_context(), ["blocks: tiny", "ops: tiny l1"])
    assert found["sections"]["blocks"] == [
        {"row": "tiny", "variant": "all", "status": "out of memory"}
    ]
    assert status == 0 and len(found["sections"]["ops"]) == 2


def test_after_the_card_is_lost_nothing_more_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch)
    monkeypatch.setattr(run, "check_ops", lambda *args: iter(()))

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def measure(context: Context, row: str) -> list[Row]:
        monkeypatch.setattr(run, "release", lost)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(run, "measure", measure)
    status, found = saved(cpu_context(), ["blocks: tiny", "ops: tiny l1"])
    assert status == 1
    (first,), (second,) = found["sections"]["blocks"], found["sections"]["ops"]
    assert first["status"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert second["status"].startswith("not run: the card was lost in blocks: tiny")
