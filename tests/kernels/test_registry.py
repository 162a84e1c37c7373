"""A kernel runs on a device only after it has proved its numbers there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adarank_kernels.runtime import registry


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A registry of its own and a device that only pretends to be a GPU."""
    calls: list[str] = []
    monkeypatch.setattr(registry, "_checks", {})
    monkeypatch.setattr(registry, "_status", {})
    monkeypatch.setattr(registry, "waiting_in_use", set())
    monkeypatch.setattr(registry, "_settled", {})
    monkeypatch.setattr(registry, "_waiting", set())
    monkeypatch.setattr(registry, "HAS_TRITON", True)
    monkeypatch.setattr(registry, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())

    def good(device: torch.device) -> None:
        calls.append("good")

    def bad(device: torch.device) -> None:
        calls.append("bad")
        registry.check_close(torch.ones(2), torch.zeros(2), torch.zeros(2).double())

    registry.register("good", good)
    registry.register("bad", bad)
    return calls


def test_checked_once_and_remembered(checked: list[str]) -> None:
    device = torch.device("cuda:0")
    for _ in range(3):
        assert registry.ready("good", device, torch.bfloat16)
        assert not registry.ready("bad", device, torch.bfloat16)
    assert checked == ["good", "bad"]
    status = registry.kernel_status("cuda:0")
    assert status["good"] == "passed"
    assert status["bad"].startswith("failed: ArithmeticError: error 1 above")
    assert registry.kernel_status("cuda:1")["good"] == "not checked yet"


def test_never_on_the_cpu_in_float32_or_during_capture(
    checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not registry.ready("good", torch.device("cpu"), torch.bfloat16)
    assert not registry.ready("good", torch.device("cuda:0"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not registry.ready("good", torch.device("cuda:0"), torch.bfloat16)
    assert checked == []


def test_nan_fails_the_check() -> None:
    with pytest.raises(ArithmeticError):
        registry.check_close(torch.tensor([float("nan")]), torch.zeros(1), torch.zeros(1).double())


class Kernel:
    """What `launch` needs of a jitted function; writes down who launched."""

    arg_names = ["x", "n", "BLOCK", "FLAG"]

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.log.append(("looked up", grid, arguments, constants))
            return Compiled(self.log)

        return run


class Compiled:
    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        self.log = log

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.log.append(("directly", grid, arguments))


def test_a_second_launch_takes_no_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_compiled", {})
    monkeypatch.setattr(registry, "INTERPRETED", False)
    kernel, other = Kernel(), Kernel()
    constants = {"num_warps": 4, "FLAG": True, "BLOCK": 16}
    registry.launch(kernel, "key", (2, 3), (7, 8), constants)
    registry.launch(kernel, "key", (5, 1), (9, 10), constants)
    assert kernel.log == [
        ("looked up", (2, 3), (7, 8), constants),
        ("directly", (5, 1, 1), (9, 10, 16, True)),  # constants in the signature's order
    ]
    registry.launch(kernel, "another key", (2, 3), (7, 8), constants)
    registry.launch(kernel, "key", (2, 3), (7, 8), constants | {"BLOCK": 32})
    registry.launch(other, "key", (2, 3), (7, 8), constants)
    assert [entry[0] for entry in kernel.log[2:] + other.log] == ["looked up"] * 3
    for where, name, value in ((registry, "INTERPRETED", True), (torch.version, "hip", "6.4")):
        with monkeypatch.context() as patch:  # the interpreter; a ROCm build
            patch.setattr(where, name, value)
            registry.launch(kernel, "key", (2, 3), (7, 8), constants)
        assert kernel.log[-1] == ("looked up", (2, 3), (7, 8), constants)
        registry.launch(kernel, "key", (2, 3), (7, 8), constants)
        assert kernel.log[-1][0] == "directly"


def test_whatregistry_tells_apart_in_integers() -> None:
    values = (0, 1, 7, 16, 33, 48, 2**31, 2**31 + 1)
    kinds = [registry.kind(value) for value in values]
    assert kinds[0] == kinds[3] == kinds[5] and kinds[2] == kinds[4]
    assert len(set(kinds)) == 5


def test_settled_states_are_remembered_until_they_change(checked: list[str]) -> None:
    device, names = torch.device("cuda:0"), ("good", "bad")
    for _ in range(2):
        assert registry.ready_among(names, device, torch.bfloat16) == {"good"}
    assert checked == ["good", "bad"]
    registry.choose(["bad"], device)
    assert registry.ready_among(names, device, torch.bfloat16) == {"bad"}
    assert registry.kernel_status(device) == {"good": "not chosen", "bad": "passed"}
    assert registry.ready_among(names, torch.device("cpu"), torch.bfloat16) == set()


def test_what_waits_for_a_verdict_runs_only_where_it_is_chosen(checked: list[str]) -> None:
    registry.register("slow?", lambda device: checked.append("slow?"), waits=True)
    device, names = torch.device("cuda:0"), ("good", "slow?")
    for _ in range(2):
        assert registry.ready_among(names, device, torch.bfloat16) == {"good"}
    assert checked == ["good"] and len(registry._settled) == 1
    assert registry.kernel_status(device)["slow?"] == "waits for a verdict"
    registry.choose(["slow?"], device)
    assert registry.ready_among(names, device, torch.bfloat16) == {"slow?"}
