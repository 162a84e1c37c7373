"""What the tests of the LoRA ops share."""

from __future__ import annotations

import pytest

from adarank_kernels.lora import skinny


@pytest.fixture(params=["native", "torch"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the products with few ranks: `skinny`'s and torch's."""
    monkeypatch.setattr(skinny, "LEAST_ROWS", 1 if request.param == "native" else 1 << 62)
    return request.param
