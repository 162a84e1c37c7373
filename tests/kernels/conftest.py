"""Every test of the LoRA ops runs the ways there are to compute them."""

from __future__ import annotations

import pytest
import torch

from adarank_kernels.lora.backends import cpu
from adarank_kernels.lora.group import Group
from adarank_kernels.runtime import native

WAYS = ("whole", "stepwise", "torch", "flat")


def choose_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole C++ passes, C++ operators one by one, torch's products in our node or in theirs."""
    if way in ("torch", "flat"):
        monkeypatch.setattr(native, "_loaded", False)
        monkeypatch.setattr(cpu, "_usable", {torch.float32: False})
    if way == "torch":
        monkeypatch.setattr(Group, "is_few", lambda group, x: False)
    if way != "whole":
        monkeypatch.setattr(Group, "_whole_backend", lambda group, x: False)


@pytest.fixture(params=WAYS)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the products with few ranks are computed."""
    choose_way(request.param, monkeypatch)
    return request.param
