"""Statistics, interleaving and captured graphs of the GPU benchmark, with no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bench.counts import Cost
from bench.gpu import timing
from bench.gpu.context import summary
from bench.gpu.timing import Graphs, Step, rotating
from tests.bench.gpu_benchmark import cpu_context, out_of_memory


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


def test_interleaving_counts_calls_and_goes_on_without_what_fails() -> None:
    before: list[int] = []
    steps = {
        "three at once": rotating(lambda t: t + 1, [(torch.ones(1),)] * 3),
        "one": Step(lambda: None, before=lambda: before.append(1)),
        "large": Step(out_of_memory),
    }
    timer = Scripted()
    seconds, failed = timing.timed(steps, 4, timer)
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
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(timing, "free_generator", lambda _: self.log.append("generator"))
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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("x"), "out of memory"),
        (RuntimeError("CUDA error: out of memory\n..."), "out of memory"),
        (ValueError("a\nb"), "check failed: ValueError: a"),
    ],
)
def test_what_ran_out_of_memory_is_no_failed_check(error: Exception, said: str) -> None:
    def check() -> None:
        raise error

    assert timing.refusal(check) == said and timing.refusal(lambda: None) is None
