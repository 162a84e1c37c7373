"""The GPU benchmark's rows of whole steps, host time and profiles, on the CPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import report, rivals, rows, run, training
from bench.gpu.__main__ import parse
from tests.bench.gpu_benchmark import cpu_context, make_tiny

UNSLOTH = """
import torch
from . import undefined_here


def apply(layer, x):
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    y = torch.nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    return y + layer.scaling["default"] * (x @ A.t()) @ B.t()


def apply_lora_qkv(self, x):
    return tuple(apply(layer, x) for layer in (self.q_proj, self.k_proj, self.v_proj))


def apply_lora_o(self, x):
    return apply(self.o_proj, x)


def apply_lora_mlp_swiglu(self, x):
    h = torch.nn.functional.silu(apply(self.gate_proj, x)) * apply(self.up_proj, x)
    return apply(self.down_proj, h)
"""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    make_tiny(monkeypatch)
    monkeypatch.setattr(run, "check_ops", lambda *args: iter(()))
    return monkeypatch


def sections(jobs: list[str], **options: Any) -> dict[str, Any]:
    context, found = cpu_context("float32", 2), {}
    for name, value in options.items():
        setattr(context, name, value)
    status = run.run(context, jobs, lambda c, s, done: found.update(s), lambda text: None)
    assert status == 0, report.failures(context.checks, found)
    return found


def test_host_and_profiles(tiny: pytest.MonkeyPatch) -> None:
    jobs = ["host: launches from the host", "profiles: kernels of tiny",
            "profiles: kernels of ranks of tiny writer"]  # fmt: skip
    found = sections(jobs)
    host = {row["variant"]: row for row in found["host"]}
    assert host["torch.mm of 16 x 16"]["host_seconds"] > 0
    assert host["Triton, 4 tensors"]["status"].startswith("not run: no Triton")
    assert {row["variant"] for row in found["profiles"]} == {"frozen", "peft", "ours"}
    for row in found["profiles"]:
        assert row["kernels"] and row["kernel_microseconds"] > 0


def installed(tiny: pytest.MonkeyPatch, folder: Path) -> None:
    """A package in the place of Unsloth's: its `__init__` cannot be run, one module can."""
    for name in [n for n in sys.modules if n.partition(".")[0] in ("unsloth", "unsloth_zoo")]:
        tiny.delitem(sys.modules, name)
    for package in ("unsloth", "unsloth/kernels", "unsloth_zoo"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise NotImplementedError('no GPU')")
    (folder / "unsloth/kernels/undefined_here.py").write_text("")
    (folder / "unsloth/kernels/fast_lora.py").write_text(UNSLOTH)
    tiny.syspath_prepend(folder)


def test_host_time_of_a_block_and_others_functions(
    tiny: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed(tiny, tmp_path)
    tiny.setitem(rows.EAGER, "tiny without dropout", ("tiny", 2, 20, 0.0))
    found = sections(["eager: tiny host", "eager: tiny without dropout"])
    by_row: dict[str, dict[str, Any]] = {}
    for row in found["eager"]:
        by_row.setdefault(row["row"], {})[row["variant"]] = row
    plain, dropped = by_row["tiny without dropout"], by_row["tiny host"]
    for name in ("frozen", "PEFT", "ours", "Unsloth's functions"):
        assert plain[name]["host_seconds"] > 0 and plain[name]["eager_seconds"] > 0
    assert dropped["Unsloth's functions"]["status"] == "not run: its functions have no dropout"
    assert plain["axolotl's functions"]["status"].startswith("not run: axolotl cannot be imported")


def test_others_functions_that_compute_something_else_are_not_timed(
    tiny: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed(tiny, tmp_path)
    wrong = UNSLOTH.replace("return apply(self.o_proj, x)", "return 1.1 * apply(self.o_proj, x)")
    (tmp_path / "unsloth/kernels/fast_lora.py").write_text(wrong)
    tiny.setitem(rows.EAGER, "tiny plain", ("tiny", 2, 20, 0.0))
    context, found = cpu_context("float32", 2), {}
    jobs = ["eager: tiny plain", "training: steps of tiny"]
    context.until = time.perf_counter() + 90  # too little to compile
    assert run.run(context, jobs, lambda c, s, done: found.update(s), lambda text: None) == 1
    for section in ("eager", "training"):
        rival = next(r for r in found[section] if r["variant"].startswith("Unsloth"))
        assert rival["status"].startswith("check failed") and "eager_seconds" not in rival


def test_whole_steps(tiny: pytest.MonkeyPatch) -> None:
    jobs = ["training: steps of tiny", "training: steps of tiny, checkpointed",
            "qlora: steps of tiny, NF4"]  # fmt: skip
    found = sections(jobs, until=time.perf_counter() + 90)
    by_row: dict[str, dict[str, Any]] = {}
    for row in found["training"] + found["qlora"]:
        by_row.setdefault(row["row"], {})[row["variant"]] = row
    assert len(by_row) == 3
    for variants in by_row.values():
        for name in ("frozen", "PEFT", "ours", "ours, recompute_mlp"):
            assert variants[name]["eager_tokens_per_second"] > 0, name
        assert variants["ours"]["difference_from_peft"] < 1e-5
        assert variants["ours"]["error_in_float64"] < 1e-3
    ours, peft = (by_row["steps of tiny"][name] for name in ("ours", "PEFT"))
    assert ours["last_loss"] == pytest.approx(peft["last_loss"], rel=1e-5)
    assert ours["last_loss"] < ours["first_loss"]
    assert by_row["steps of tiny"]["ours, default"]["status"] == "not run: no time was left"
    assert by_row["steps of tiny"]["PEFT + Liger"]["status"].startswith("not run: liger_kernel")


def test_whole_steps_with_float32_adapters(tiny: pytest.MonkeyPatch) -> None:
    tiny.setitem(rows.TRAINING, "bf16", rows.Training("tiny writer", None, 2, 12, others=False))
    context, found = cpu_context("bfloat16", 1), {}
    run.run(context, ["training: bf16"], lambda c, s, done: found.update(s), lambda text: None)
    variants = {row["variant"]: row for row in found["training"]}
    assert {"PEFT, float32", "ours, float32"} <= variants.keys()
    assert all(row["status"] == "ok" for row in variants.values()), variants


def test_liger_is_entered_by_its_public_patch(tiny: pytest.MonkeyPatch) -> None:
    """The model type chooses the patch; what it replaced in transformers' module is put back."""
    from types import ModuleType

    from transformers.models.qwen3 import modeling_qwen3

    patches: Any = ModuleType("liger_kernel.transformers.monkey_patch")
    before = modeling_qwen3.Qwen3RMSNorm

    def patch(model: torch.nn.Module, rope: bool, **options: bool) -> None:
        assert not rope and options["fused_linear_cross_entropy"]
        modeling_qwen3.Qwen3RMSNorm = None
        model.patched = True

    patches.apply_liger_kernel_to_qwen3 = patch
    tiny.setattr(rivals, "imported", lambda module: patches)
    frozen = training.base_of(cpu_context("float32"), rows.TRAINING["steps of tiny"], None)
    assert rivals.with_liger(frozen).patched and modeling_qwen3.Qwen3RMSNorm is before


def test_parts_cover_what_a_card_is_asked_first() -> None:
    first, second, third, fourth = (parse(["--part", part]) for part in rows.PARTS)
    assert first.minutes == rows.MINUTES and (first.checks, second.checks) == ("all", "kernels")
    assert {job.partition(":")[0] for job in second.jobs} == {"eager", "qlora"}
    assert third.jobs == [f"training: {row}" for row in rows.TRAINING]
    assert {job.partition(":")[0] for job in fourth.jobs} == {"blocks", "kernels"}
    assert {job.partition(":")[0] for job in first.jobs} == {
        "host", "profiles", "ops", "predictions",
    }  # fmt: skip


def test_without_time_nothing_more_begins(tiny: pytest.MonkeyPatch) -> None:
    found = sections(["blocks: tiny"], until=time.perf_counter() - 1)
    assert found["blocks"][0]["status"] == f"not run: {report.NO_TIME}"
