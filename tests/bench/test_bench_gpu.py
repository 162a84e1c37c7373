"""The GPU benchmark without a GPU: options, checks, statistics, table, file, failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench.counts import Cost
from bench.gpu import checks, page, predictions, report, run, steps, timing
from bench.gpu.__main__ import parse
from bench.gpu.context import Context, Row, summary
from bench.gpu.rows import names
from bench.gpu.timing import Graphs, Step, interleaved, rotating
from tests.bench.gpu_benchmark import TINY, TINY_OPS, TINY_PREDICTIONS, cpu_context, make_tiny

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
        (["--only", "nonsense"], "'nonsense' matches none of: blocks: "),
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


# Statistics


def test_medians_and_quartiles() -> None:
    found = summary("eager", [4.0, 1.0, 3.0, 2.0, 100.0])
    assert found == {"repetitions": 5, "eager_seconds": 3.0, "eager_quartiles": [2.0, 4.0]}
    assert summary("graph", [2.0])["graph_quartiles"] == [2.0, 2.0]
    assert summary("graph", []) == {}


def test_shares_of_the_cards_own_rates_prefer_the_graph() -> None:
    context = cpu_context()
    context.bandwidth, context.rate = 1000.0, 5000.0
    row = context.shares({"eager_seconds": 9.0, "graph_seconds": 2.0}, Cost(500.0, 1000.0))
    assert row["bandwidth_share"] == 0.25 and row["matmul_share"] == 0.1
    assert "bandwidth_share" not in context.shares({"status": "out of memory"}, Cost(1.0, 1.0))


def test_overheads_over_the_frozen_base() -> None:
    rows: list[Row] = [
        {"variant": "frozen", "eager_seconds": 2.0, "graph_seconds": 1.0},
        {"variant": "peft", "eager_seconds": 3.0},
    ]
    steps.overheads(rows, "frozen")
    assert rows[1]["eager_overhead"] == 0.5 and "graph_overhead" not in rows[1]
    assert "eager_overhead" not in rows[0]


class Scripted:
    """A timer with known answers that counts what it was asked."""

    def __init__(self, name: str = "eager") -> None:
        self.name, self.asked = name, 0

    def ready(self, step: Step) -> Any:
        step.run()
        return step.run

    def seconds(self, run: Any) -> float:
        self.asked += 1
        return 6.0


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_interleaving_counts_calls_and_goes_on_without_what_fails() -> None:
    before: list[int] = []
    timed = {
        "three at once": rotating(lambda t: t + 1, [(torch.ones(1),)] * 3),
        "one": Step(lambda: None, before=lambda: before.append(1)),
        "large": Step(out_of_memory),
    }
    timer = Scripted()
    seconds, failed = interleaved(timed, 4, timer)
    assert seconds == {"three at once": [2.0] * 4, "one": [6.0] * 4}
    assert failed == {"large": "out of memory"} and timer.asked == 8 and len(before) == 4


def test_a_step_that_fails_is_not_timed_again_and_says_why() -> None:
    context = cpu_context()
    context.timers = lambda: [Scripted("eager"), Scripted("graph")]
    rows = context.measure("row", {"good": Step(lambda: None), "large": Step(out_of_memory)})
    assert [row["status"] for row in rows] == ["ok", "out of memory"]
    assert rows[0]["graph_seconds"] == 6.0 and "eager_seconds" not in rows[1]


def test_a_graph_is_believed_only_if_a_replay_writes_its_outputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    written, index = torch.ones(3), torch.ones(2, dtype=torch.int64)

    class Graph:
        def replay(self) -> None:
            written.fill_(7.0)

    Graphs._believe(Graph(), [written, index])
    assert written.tolist() == [7.0] * 3 and index.tolist() == [1, 1]
    with pytest.raises(ArithmeticError, match="unwritten"):
        Graphs._believe(Graph(), [written, torch.ones(1)])


class Cuda:
    """`torch.cuda` as far as a capture needs it; writes down what happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, breaks: bool = False) -> None:
        self.log: list[str] = []
        self.current: Any = self
        for name in ("stream", "graph", "CUDAGraph", "current_stream", "set_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: Cuda.Stream())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(timing, "_free_generator", lambda: self.log.append("generator"))
        self.breaks = breaks

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    wait_stream = Stream.wait_stream

    class CUDAGraph:
        def pool(self) -> Any:
            return self

        def replay(self) -> None:
            pass

    def current_stream(self) -> Any:
        return self.current

    def set_stream(self, stream: Any) -> None:
        self.current = stream

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.current, outside = stream, self.current
        yield
        self.current = outside

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any) -> Iterator[None]:
        self.log.append("capture in a shared pool" if pool else "capture")
        self.current, outside = stream, self.current
        if self.breaks:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield
        self.current = outside


def test_a_capture_warms_up_first_and_starts_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, graphs = Cuda(monkeypatch), Graphs()
    step = Step(lambda: cuda.log.append("run"), before=lambda: cuda.log.append("before"))
    graphs.ready(step)
    assert cuda.log == ["before", "run"] * 3 + ["before", "capture", "run"]
    graphs.ready(step)
    assert cuda.log[-2:] == ["capture in a shared pool", "run"] and len(graphs.graphs) == 2
    with pytest.raises(ValueError, match="cannot be captured"):
        graphs.ready(Step(lambda: None, captured=False))


def test_a_capture_that_breaks_off_leaves_the_stream_and_the_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, graphs = Cuda(monkeypatch, breaks=True), Graphs()
    used = graphs.stream
    with pytest.raises(RuntimeError, match="capturing"):
        graphs.ready(Step(lambda: None))
    assert cuda.current is cuda and cuda.log[-1] == "generator"
    assert graphs.stream is not used and graphs.graphs == []


def test_what_ran_out_of_memory_is_no_failed_check() -> None:
    assert timing.said_of_check(torch.OutOfMemoryError("x")) == "out of memory"
    assert timing.said_of_check(RuntimeError("CUDA error: out of memory\n...")) == "out of memory"
    assert timing.said_of_check(ValueError("a\nb")) == "check failed: ValueError: a"


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
        assert row["repetitions"] == 3 and row["eager_seconds"] > 0
        assert ("eager_overhead" in row) == (name != "frozen")
    for row in found["sections"]["kernels"]:
        timed = row["variant"] != "kernel"  # no card, no interpreter
        assert ("eager_seconds" in row) == timed == (row["status"] == "ok")
    assert all(row["eager_seconds"] > 0 for row in found["sections"]["ops"])
    predicted = [(row["row"], row["variant"]) for row in found["sections"]["predictions"]]
    assert predicted == [
        (name, variant)
        for name, probes in (("tiny writer", 4), ("tiny encoder", 16))
        for variant in ("one forward", f"naive loop, {probes} probes", "ours")
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
    loop = predictions.naive_disagreements

    def other(*args: Any, **kwargs: Any) -> dict[str, list[float]]:
        found = loop(*args, **kwargs)
        return {name: [1.001 * value for value in values] for name, values in found.items()}

    monkeypatch.setattr(predictions, "naive_disagreements", other)
    status, found = saved(cpu_context(), ["predictions: tiny writer"])
    *others, ours = found["sections"]["predictions"]
    assert status == 1 and all("eager_seconds" in row for row in others)
    assert "error" in ours["status"] and "eager_seconds" not in ours


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


# Table and file

CHECKS = [
    {"op": "lora_shrink", "case": "its own check", "kernels": "lora_shrink", "dtype": "16-bit"}
    | {"status": "passed", "share": None},
    {"op": "lora_linear", "case": "rank 6", "kernels": "+ drop", "dtype": "bfloat16"}
    | {"status": "failed: ArithmeticError: dx: error 0.5 above 0.01", "share": None},
]
ROWS: list[Row] = [
    {"row": "block", "variant": "frozen", "status": "ok", "eager_seconds": 0.002},
    {"row": "block", "variant": "ours", "status": "ok", "eager_seconds": 0.0025}
    | {"eager_overhead": 0.25, "graph": "RuntimeError: broke off", "peak_extra_bytes": 3 << 20},
    {"row": "large", "variant": "all", "status": "out of memory"},
]


def test_table_and_file_of_made_up_measurements(tmp_path: Path) -> None:
    facts = {"card": "Some Card 9000", "driver": "1.2", "time": "2026-01-02T03:04:05+00:00"}
    found = report.content(facts, {"quick": True}, CHECKS, {"blocks": ROWS}, True)
    path = tmp_path / report.default_path(facts["card"], facts["time"][:10]).name
    report.write(path, found)
    assert [p.name for p in tmp_path.iterdir()] == ["some-card-9000-2026-01-02.json"]
    assert json.loads(path.read_text()) == found
    assert found["machine"]["versions"]["torch"] and found["machine"]["card"] == facts["card"]
    assert found["failures"] == [f"lora_linear, rank 6, + drop, bfloat16: {CHECKS[1]['status']}"]

    console = Console(width=200, record=True, quiet=False, file=open(os.devnull, "w"))
    report.show(console, found, path, {"blocks": "Training steps"})
    text = console.export_text()
    for said in ("Some Card 9000, driver 1.2", "0 of 1", "2.5", "+25.0%", "3 MiB"):
        assert said in text
    assert "no graph: RuntimeError: broke off" in text and "out of memory" in text
    assert "FAILED lora_linear, rank 6" in text and str(path) in text.replace("\n", "")


def test_the_cards_rates_in_words() -> None:
    rows: list[Row] = [
        {"variant": "copy", "bytes": 4e9, "flops": 0.0, "eager_seconds": 2.0, "graph_seconds": 1.0},
        {"variant": "product", "bytes": 1.0, "flops": 3e12, "eager_seconds": 2.0},
        {"variant": "failed", "status": "out of memory"},
    ]
    assert report.card_rates(rows) == "copy: 4 GB/s; product: 1.5 TFLOP/s"


def test_the_committed_page_is_of_the_committed_files() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page()


def test_page_of_a_small_run(tmp_path: Path) -> None:
    assert "No card yet" in page.page(tmp_path)
    step = {"row": "tiny", "status": "ok"}
    found = {
        "machine": report.machine() | {"card": "Example card", "gpu": "Example card"},
        "options": {"tokens": [4, 1024], "dtype": "bfloat16", "repetitions": 7},
        "failures": ["lora_down: wrong"],
        "checks": [{"status": "passed"}, {"status": "failed"}],
        "sections": {
            "card": [step | {"variant": "copy", "eager_seconds": 1.0, "bytes": 3e9}],
            "blocks": [
                step | {"variant": "frozen", "graph_seconds": 1e-3, "eager_seconds": 2e-3},
                step | {"variant": "peft", "graph_seconds": 3e-3, "eager_seconds": 4e-3},
                step | {"variant": "ours, default", "graph_seconds": 2e-3},
            ],
            "kernels": [
                step | {"variant": "plain torch", "graph_seconds": 4e-6},
                step | {"variant": "kernel", "graph_seconds": 2e-6, "bandwidth_share": 0.5},
                step | {"row": "down, tiny", "variant": "kernel", "graph_seconds": 1e-6},
            ],
            "ops": [
                step | {"variant": "x", "eager_seconds": 5e-3, "peak_extra_bytes": 2**20},
                step | {"variant": "ours, + pairs, fused head", "eager_seconds": 1.0},
            ],
            "predictions": [step | {"variant": "ours", "eager_seconds": 0.25}],
        },
    }
    (tmp_path / "card.json").write_text(json.dumps(found))
    text = page.page(tmp_path)
    assert "1 of 2 checks passed. copy: 3 GB/s." in text and "- lora_down: wrong" in text
    assert "| tiny | 1 | 2 | 1 | 0.50 | - | - | - |" in text
    assert "| tiny | 2 | - | - | - | - | - | - |" in text
    assert "| tiny | 4.0 | 2.0 | 2.00 | 50% |" in text and "| tiny | x | 5 | 1 |" in text
    assert "| tiny | ours | 250 | - |" in text and "down, tiny" not in text
    assert "fused head" not in text
