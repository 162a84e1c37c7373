"""The GPU benchmark made small enough for the CPU: shared by its tests and the interpreter's."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from adarank_kernels.runtime import registry
from bench.counts import SHAPES, Shape
from bench.gpu import checks, ops, predictions, rows, steps, timing
from bench.gpu.context import Context
from bench.gpu.timing import Step

TINY = ("blocks: tiny", "kernels: tiny group", "kernels: pairs", "kernels: philox")
TINY_OPS = ("ops: tiny l1", "ops: tiny tv", "ops: tiny tv, reference")
TINY_PREDICTIONS = ("predictions: tiny writer", "predictions: tiny encoder")


def make_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of a few thousand parameters under the names above."""
    monkeypatch.setitem(SHAPES, "tiny", Shape(64, 96, 32, 80, 16, True, 1, 200))
    monkeypatch.setitem(rows.BLOCKS, "tiny", ("tiny", "all-linear", 0.1))
    monkeypatch.setitem(rows.GROUPS, "tiny group", ("tiny", "q/k/v"))
    monkeypatch.setitem(rows.PAIRS, "pairs", 4)
    monkeypatch.setitem(rows.PHILOX, "philox", (8, 64))
    for metric in ("l1", "tv"):
        monkeypatch.setitem(rows.DISAGREEMENTS, f"tiny {metric}", ("tiny", metric, False))
    monkeypatch.setitem(rows.DISAGREEMENTS, "tiny tv, reference", ("tiny", "tv", True))
    monkeypatch.setattr(ops, "HEAD_TOKENS", 120)
    monkeypatch.setitem(SHAPES, "tiny writer", Shape(64, 64, 32, 80, 16, True, 1, 200))
    monkeypatch.setitem(SHAPES, "tiny encoder", Shape(32, 32, 32, 48, 16, False, 2, 200))
    for kind, trials in (("tiny writer", 1), ("tiny encoder", 2)):
        monkeypatch.setitem(rows.PREDICTIONS, kind, (kind, "attention", trials))
    monkeypatch.setitem(rows.EAGER, "tiny host", ("tiny", 2, 20, 0.1))
    for row in ("kernels of tiny", "kernels of ranks of tiny writer"):
        monkeypatch.setitem(rows.PROFILES, row, row.split(" of ")[-1])
    qwen = Shape(64, 96, 48, 80, 24, True, 2, 200)
    monkeypatch.setitem(SHAPES, "Qwen3-tiny", qwen)
    for row, made in {
        "tiny": rows.Training("Qwen3-tiny", None, 2, 12, steps=2),
        "tiny, checkpointed": rows.Training(
            "tiny writer", None, 1, 12, checkpointed=True, packed=True, others=False
        ),
    }.items():
        monkeypatch.setitem(rows.TRAINING, f"steps of {row}", made)
    four_bits = rows.Training("tiny writer", None, 1, 12, base="nf4", others=False)
    monkeypatch.setitem(rows.QLORA, "steps of tiny, NF4", four_bits)
    monkeypatch.setattr(predictions, "ENCODED", (3, 7))
    monkeypatch.setattr(predictions, "WRITTEN", (2, 9))
    small = {"small": ((21,), 64, (0, 3, 20), (40, 16, 33))}
    monkeypatch.setattr(checks, "GROUPS", small)
    monkeypatch.setattr(checks, "OUTPUTS", (3, 40, 16, 50))
    monkeypatch.setattr(steps, "CHECKED_TOKENS", 20)
    # half a second each, and there is no card to empty
    monkeypatch.setattr(timing, "gc", SimpleNamespace(collect=lambda: 0))
    for state in ("_status", "_settled"):  # choosing kernels changes them
        monkeypatch.setattr(registry, state, dict(getattr(registry, state)))


class Clock:
    """The host's clock."""

    name = "eager"

    def ready(self, step: Step) -> Callable[[], object]:
        step.before()
        step.run()
        return step.run

    def seconds(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def cpu_context(dtype: str = "bfloat16", repetitions: int = 3) -> Context:
    return Context(torch.device("cpu"), lambda: [Clock()], dtype, repetitions, tokens=(2, 20))


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
