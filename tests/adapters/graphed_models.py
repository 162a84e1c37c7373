"""Blocks as graphs beside eager ones, for the tests of graphs."""

from __future__ import annotations

import copy

import torch

import adarank_fast as ada
from adarank_fast.adapters.graph_blocks import graph_with
from tests.adapters.fused_models import mixed
from tests.adapters.graph_stand_in import StandIn
from tests.tiny_models import VOCABULARY, batch


def graphed(model, shapes=None):
    """A graphed copy."""
    shapes = None if shapes is None else frozenset(shapes)
    return graph_with(copy.deepcopy(model), StandIn(), shapes)


def llama(**options):
    model = mixed("llama", **options)
    ada.accelerate(model, example=batch("llama"))
    model.config.use_cache = False
    return model


def tokens(batch_size, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batch_size, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def grads_of(model):
    return [p.grad.clone() for p in trained(model)]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def both(model, run, repetitions=4):
    """`run(model, i)` on the model and a graphed copy gives the same every time; the copy."""
    other = graphed(model)
    for i in range(repetitions):
        results = []
        for each in (other, model):
            torch.manual_seed(i)
            results.append(run(each, i))
        assert_close(*results)
    return other


def step(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *grads_of(model)]
