"""A kernel runs on a device only after it has proved its numbers there."""

from __future__ import annotations

import pytest
import torch

from adarank_kernels import _triton


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A registry of its own and a device that only pretends to be a GPU."""
    calls: list[str] = []
    monkeypatch.setattr(_triton, "_checks", {})
    monkeypatch.setattr(_triton, "_opt_in", {})
    monkeypatch.setattr(_triton, "_status", {})
    monkeypatch.setattr(_triton, "_settled", {})
    monkeypatch.setattr(_triton, "HAS_TRITON", True)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())

    def good(device: torch.device) -> None:
        calls.append("good")

    def bad(device: torch.device) -> None:
        calls.append("bad")
        _triton.check_close(torch.ones(2), torch.zeros(2), torch.zeros(2).double())

    _triton.register("good", good)
    _triton.register("bad", bad)
    _triton.register("asked", good, opt_in=True)
    return calls


def test_checked_once_and_remembered(registry: list[str]) -> None:
    device = torch.device("cuda:0")
    for _ in range(3):
        assert _triton.ready("good", device, torch.bfloat16)
        assert not _triton.ready("bad", device, torch.bfloat16)
    assert registry == ["good", "bad"]
    status = _triton.kernel_status("cuda:0")
    assert status["good"] == "passed" and status["asked"] == "off"
    assert status["bad"].startswith("failed: ArithmeticError: error 1 above")
    assert _triton.kernel_status("cuda:1")["good"] == "not checked yet"


def test_opt_in(registry: list[str]) -> None:
    device = torch.device("cuda:0")
    assert not _triton.ready("asked", device, torch.float16)
    _triton.enable("asked")
    assert _triton.ready("asked", device, torch.float16)
    with pytest.raises(ValueError, match="'good'"):
        _triton.enable("good")


def test_never_on_the_cpu_in_float32_or_during_capture(
    registry: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not _triton.ready("good", torch.device("cpu"), torch.bfloat16)
    assert not _triton.ready("good", torch.device("cuda:0"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not _triton.ready("good", torch.device("cuda:0"), torch.bfloat16)
    assert registry == []


def test_nan_fails_the_check() -> None:
    with pytest.raises(ArithmeticError):
        _triton.check_close(torch.tensor([float("nan")]), torch.zeros(1), torch.zeros(1).double())
