"""What a prediction will cost."""

from __future__ import annotations

import torch

import adarank_fast as ada
from adarank_fast.prediction.cost import suggest
from adarank_fast.prediction.folding import FOLDED
from tests.tiny_models import batch, tiny


def test_estimate_cost():
    model, batches = tiny("bert"), [batch("bert"), batch("bert", seed=1)]
    cost = ada.estimate_cost(model, batches, "attention", trials=3)
    assert (cost.modules, cost.probes, cost.blocks) == (12, 12 * 3 * 2, 3)
    assert 0.4 * cost.naive_flops < cost.flops < 0.9 * cost.naive_flops
    assert cost.seconds > 0 and cost.memory_bytes > 0
    assert set(cost.routes.values()) == {FOLDED}


def test_bfloat16_is_suggested_on_a_gpu_only():
    class Somewhere:
        def __init__(self, device, dtype):
            self.device, self.dtype = torch.device(device), dtype

    assert "--probe-dtype bfloat16" in suggest(Somewhere("cuda", torch.float32))
    assert not suggest(Somewhere("cuda", torch.bfloat16))
    assert not suggest(Somewhere("cpu", torch.float32))
