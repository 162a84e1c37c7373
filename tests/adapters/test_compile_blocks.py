import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import adarank_fast as ada
from tests.tiny_models import batch, spread, tiny

LAYERS = 10  # beyond torch._dynamo.config.recompile_limit, 8


@pytest.fixture(autouse=True)
def untouched_dynamo():
    names = ("force_parameter_static_shapes", "force_nn_module_property_static_shapes")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in names}):
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


def mixed(model, inputs, first=2):
    """Another rank for every layer."""
    sizes = {t.name: (t.in_features, t.out_features) for t in ada.find_targets(model, "attention")}
    ranks = {name: first + i // 4 for i, name in enumerate(sizes)}
    peft_model = ada.inject(model, ada.RankPlan(ranks, sizes), example=inputs)
    spread(peft_model)
    return peft_model


def gradients(model, inputs):
    model.train().zero_grad()
    torch.manual_seed(0)
    outputs = model(**inputs)
    outputs.logits.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_one_graph_for_blocks_of_many_ranks():
    inputs = {**batch("llama"), "use_cache": False}  # a cache makes every layer a graph
    model = mixed(tiny("llama", layers=LAYERS), inputs)
    expected = gradients(model, inputs)
    counter = CompileCounter()
    ada.compile_blocks(model, backend=counter)
    found = gradients(model, inputs)
    assert 1 <= counter.frame_count <= 2  # the first block's input needs no gradient
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(scale))
    compiled, optimizer = counter.frame_count, torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # no compilation from step to step
        optimizer.step()
        gradients(model, inputs)
    assert counter.frame_count == compiled


def test_without_marks_every_rank_is_a_graph():
    inputs = {**batch("llama"), "use_cache": False}  # a cache makes every layer a graph
    model = mixed(tiny("llama", layers=4), inputs)
    counter = CompileCounter()
    for block in model.get_base_model().model.layers:
        block.compile(backend=counter)
    gradients(model, inputs)
    assert counter.frame_count == 4


def test_multiples_need_few_graphs_without_marks():
    """A score for each layer, ranks of 8 and 16: two kinds of blocks for torch.compile to see."""
    inputs = {**batch("llama"), "use_cache": False}
    model = tiny("llama", layers=LAYERS)
    sizes = {t.name: (t.in_features, t.out_features) for t in ada.find_targets(model, "attention")}
    scores = {name: float(10 + i // 4) for i, name in enumerate(sizes)}
    ranks = ada.allocate_ranks(scores, average_rank=12, rank_multiple=8, min_rank=8)
    assert set(ranks.values()) == {8, 16}
    peft_model = ada.inject(model, ada.RankPlan(ranks, sizes), example=inputs)
    counter = CompileCounter()
    for block in peft_model.get_base_model().model.layers:
        block.compile(backend=counter)
    gradients(peft_model, inputs)
    assert counter.frame_count <= 4  # the first block's input needs no gradient


def test_nothing_to_compile():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="nothing is fused"):
        ada.compile_blocks(model)
    with pytest.raises(ValueError, match="Sequential has no ModuleList of blocks"):
        ada.compile_blocks(ada.inject(model, ada.RankPlan.uniform(model, 2, "all-linear")))
