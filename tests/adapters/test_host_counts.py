"""How much the host does in a step of fused layers on the GPU path: counts, which nobody times.

Over the frozen layers, forward and backward. A count above its limit means a slower eager step.
"""

from __future__ import annotations

import sys

import pytest
import torch

from adarank_kernels.runtime import native
from adarank_kernels.runtime.registry import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("the GPU path needs Triton's launcher", allow_module_level=True)

from bench.bench_host import gpu_path, launches_of, steps_of_row


def calls_of(step):
    """Python frames and calls of C functions from Python."""
    counts = {"call": 0, "c_call": 0}

    def note(frame, event, arg):
        if event in counts:
            counts[event] += 1

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return counts["call"], counts["c_call"] - 1  # which ends the profile


def aten_calls_of(step):
    with torch.profiler.profile() as profile:
        step()
    return sum(event.name.startswith("aten::") for event in profile.events())


# launches, aten calls (with those that they make), Python frames, C calls
LIMITS = {
    ("q/k/v", "ours"): (0, 89, 21, 51),
    ("q/k/v, dropout 0.1", "ours"): (0, 94, 21, 51),
    ("q/k/v", "python"): (0, 148, 22, 79),
    ("q/k/v, float32 adapters", "ours"): (0, 115, 21, 51),
    ("one layer", "ours"): (0, 30, 6, 17),
    ("q/k/v, 4 bit", "ours"): (0, 131, 38, 58),
}


@pytest.mark.parametrize("row, arm", LIMITS)
def test_a_step_does_no_more_than_it_did(row, arm):
    if arm == "ours" and native.operators() is None:
        pytest.skip("no C++ operators here")
    if "4 bit" in row:
        pytest.importorskip("bitsandbytes")
    with gpu_path():
        steps = steps_of_row(row)
        found = []
        for name in ("frozen", arm):
            step = steps[name]
            step()
            found.append((launches_of(step), aten_calls_of(step), *calls_of(step)))
    over = tuple(ours - frozen for frozen, ours in zip(*found, strict=True))
    assert all(o <= limit for o, limit in zip(over, LIMITS[row, arm], strict=True)), over
