"""The capture of CUDA graphs with `torch.cuda` stubbed: streams, pool, what breaks off."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch

from adarank_fast.adapters import graph_backends
from adarank_fast.adapters.graph_backends import CudaGraphs


class Cuda:
    """As much of `torch.cuda` as a capture needs; writes down what happens."""

    def __init__(self, monkeypatch):
        self.log, self.current, self.streams = [], "outside", 0
        for name in ("Stream", "CUDAGraph", "graph", "graph_pool_handle", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "set_stream", self.set_stream)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        freed = lambda device: self.log.append("generator")  # noqa: E731
        monkeypatch.setattr(graph_backends, "free_generator", freed)

    def Stream(self, device):
        self.streams += 1
        return f"stream {self.streams}"

    def graph_pool_handle(self):
        return "pool"

    def current_stream(self, device):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    class CUDAGraph:
        def replay(self):
            return "replayed"

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.log.append((pool, stream, capture_error_mode))
        before, self.current = self.current, stream
        yield
        self.current = before  # not where it breaks off, as in torch


def test_captures_share_a_pool_and_a_stream(monkeypatch):
    cuda = Cuda(monkeypatch)
    backend = CudaGraphs(torch.device("cuda", 0))
    y = torch.ones(2)
    outputs, replay = backend.capture(lambda: [y])
    assert outputs[0] is y and replay() == "replayed"
    backend.capture(lambda: [y])
    assert cuda.log == [("pool", "stream 1", "thread_local")] * 2 and cuda.current == "outside"


def test_a_capture_that_breaks_off_gives_the_stream_and_the_generator_back(monkeypatch):
    cuda = Cuda(monkeypatch)
    backend = CudaGraphs(torch.device("cuda", 0))

    def broken():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        backend.capture(broken)
    assert cuda.current == "outside" and cuda.log[-1] == "generator"
    assert backend.stream == "stream 2"


def test_what_draws_on_the_host_is_not_captured(monkeypatch):
    """A choice by such a number would be the same in every replay."""
    Cuda(monkeypatch)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="random numbers drawn on the host"):
        CudaGraphs(torch.device("cuda", 0)).capture(lambda: [torch.rand(2)])
    assert torch.equal(torch.get_rng_state(), before)
