"""The GPU benchmark's checks and kernel rows with the Triton kernels under the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adarank_kernels.disagreement import triton
from adarank_kernels.lora import triton_launch as launch
from adarank_kernels.runtime import registry
from bench.gpu import checks, rows, run
from tests.bench.gpu_benchmark import TINY, cpu_context, make_tiny


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One dtype, a block without dropout."""
    make_tiny(monkeypatch)
    monkeypatch.setitem(rows.BLOCKS, "tiny", ("tiny", "attention", 0.0))
    monkeypatch.setattr(checks, "DTYPES", {"bfloat16": torch.bfloat16})
    return monkeypatch


def test_every_kernel_and_op_passes_and_every_kernel_is_timed(tiny: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    context = cpu_context(repetitions=1)
    status = run.run(context, TINY, lambda c, s, done: found.update(s), lambda text: None)
    failed = [c for c in context.checks if c["status"] != "passed"]
    assert status == 0 and not failed
    own = [c["op"] for c in context.checks if c["case"] == "its own check"]
    assert len(own) == 8 and {c["kernels"] for c in context.checks} >= {*checks.LORA_SETS}
    kernels = {row["row"]: row for row in found["kernels"] if row["variant"] == "kernel"}
    assert len(kernels) == 9
    assert all(0 < row["bandwidth_share"] for row in kernels.values())
    variants = {row["variant"] for row in found["blocks"]}
    assert {"ours, default", "ours, vendor GEMMs"} <= variants


def test_a_wrong_kernel_is_found_and_left_out(tiny: pytest.MonkeyPatch) -> None:
    few = {name: registry._checks[name] for name in ("lora_shrink", "lora_drop")}
    tiny.setattr(registry, "_checks", few)
    right = launch.shrink

    def wrong(X: torch.Tensor, A: torch.Tensor, seed: Any, dropout: float) -> torch.Tensor:
        return right(X, A, seed, dropout) * 1.1

    tiny.setattr(launch, "shrink", wrong)
    context = cpu_context(repetitions=1)
    context.checks = list(checks.check_kernels(context.device))
    failed = {c["op"]: c["status"] for c in context.checks if c["status"] != "passed"}
    assert failed.keys() == {"lora_shrink"}
    assert failed["lora_shrink"].startswith("failed: ArithmeticError: error")
    assert context.sets(checks.LORA_SETS) == {
        "vendor GEMMs": (),
        checks.DEFAULT: ("lora_drop",),
    }
    assert context.failure("lora_shrink") and not context.failure("lora_drop")


def test_plain_torch_computes_what_the_pairs_kernel_does() -> None:
    f = torch.randn(8, 5, 300, generator=torch.Generator().manual_seed(0))
    plain = (f[:, None] - f).abs().sum(-1)
    torch.testing.assert_close(triton.compare(f, "l1").float(), plain)
