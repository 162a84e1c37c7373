"""Graphs of blocks that skip, share, change places or are called in another order."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.adapters import graphs as graphs_module
from adarank_fast.adapters.graph_blocks import graph_report, graph_with
from tests.adapters.graph_stand_in import StandIn
from tests.adapters.graphed_models import assert_close, both, graphed, llama, step, tokens, trained


class Orders(nn.Module):
    """Blocks whose backward needs their outputs, called in one order or the other."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    def forward(self, x, order):
        for i in order:
            x = self.blocks[i](x)
        return x


def test_blocks_in_another_order_than_that_of_their_capture():
    torch.manual_seed(0)
    plain = Orders()
    model = graph_with(copy.deepcopy(plain), StandIn())
    for order in [(0, 1, 2)] * 4 + [(2, 1, 0), (0, 2, 1), (0, 0, 1), (0, 1, 2)]:
        found = []
        for each in (model, plain):
            x = torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
            each.zero_grad()
            each(x, order).sin().sum().backward()
            found.append([x.grad, *(block[0].weight.grad for block in each.blocks)])
        assert_close(*found)
    assert graph_report(model).graphed_calls >= 3 * 3 + 3


class Skip(nn.Module):
    """Blocks that hand tensors over, around each other, and back to the caller."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Two() for _ in range(4))

    def forward(self, x, scale):
        kept, hidden = [], x
        for i, block in enumerate(self.blocks):
            hidden, other = block(hidden, scale=scale, options={"twice": i % 2 == 0})
            kept.append(other)
        return hidden + kept[0] * kept[2].sum(), kept


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.unused = nn.Linear(2, 2)

    def forward(self, x, scale, options=None):
        y = self.linear(x).sin() * scale
        return (y * 2 if options["twice"] else y), {"other": y}["other"].cos()


def test_skips_shared_inputs_that_need_gradients_and_leaves():
    torch.manual_seed(0)
    plain = Skip()
    model = graph_with(copy.deepcopy(plain), StandIn())
    for i in range(5):
        found = []
        for each in (model, plain):
            torch.manual_seed(i)
            x, scale = (torch.randn(*size, requires_grad=True) for size in ((3, 6), (6,)))
            each.zero_grad()
            (each(x, scale)[0].sin() * torch.randn(3, 6)).sum().backward()
            assert each.blocks[0].unused.weight.grad is None
            found.append([x.grad, scale.grad, *(block.linear.weight.grad for block in each.blocks)])
        assert_close(*found)
    before = [grad.clone() for grad in found[0]]  # `.grad` is no buffer of a graph
    model.zero_grad()
    x, scale = (torch.ones(*size, requires_grad=True) for size in ((3, 6), (6,)))
    model(x, scale)[0].sum().backward()
    assert_close(found[0], before)
    statics = model.blocks[0]._adarank_graphs.graphs.session.statics
    assert sorted(s.buffer.shape for s in statics) == [(3, 6), (6,)]  # the rest is shared


def test_a_loss_on_a_part_and_backwards_out_of_order():
    torch.manual_seed(0)
    model = graph_with(Skip(), StandIn())
    x, scale = torch.randn(3, 6, requires_grad=True), torch.ones(6)
    for _ in range(3):
        model(x, scale)[0].sum().backward()
    output, kept = model(x, scale)
    kept[1].sum().backward()
    with pytest.raises(ada.AdarankError, match=r"another order .*restore\(model\)"):
        output.sum().backward()
    loss = model(x, scale)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(ada.AdarankError, match="a second backward pass"):
        loss.backward()
    before = graph_report(model).graphed_calls
    model(x, scale)[0].sum().backward()  # and goes on
    assert graph_report(model).graphed_calls == before + 4


class Detour(nn.Module):
    """Two blocks; between them sometimes something else, with or without gradients."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Two() for _ in range(2))

    def forward(self, x, scale, detour):
        hidden, _ = self.blocks[0](x, scale, options={"twice": False})
        if detour:
            hidden = hidden.cos()
        return self.blocks[1](hidden.tanh() if detour else hidden, scale, {"twice": True})[0]


def test_what_lies_between_blocks_may_change_and_shared_inputs_may_part():
    """A graph's output, or an input that another graph under way reads, is not written over."""
    torch.manual_seed(0)
    plain = Detour()
    model = graph_with(copy.deepcopy(plain), StandIn())
    for i in range(8):
        results = []
        for each in (model, plain):
            torch.manual_seed(i)
            x = torch.randn(3, 6, requires_grad=True)
            each.zero_grad()
            y = each(x, torch.randn(6), i >= 5)
            if i == 7:  # two forwards, of which only the masks' contents differ
                y = y + each(x, torch.randn(6), True)
            y.sin().sum().backward()
            results.append([x.grad, *(block.linear.weight.grad for block in each.blocks)])
        assert_close(*results)


def test_shapes_that_never_repeat_are_said_and_not_remembered(monkeypatch):
    monkeypatch.setattr(graphs_module, "MOST_KINDS", 10)
    model = graphed(llama())
    for length in range(3, 13):
        step(model, tokens(1, length))
    report = graph_report(model)
    assert report.graphed_calls == 0 and "pad batches to few lengths" in str(report)
    place = model.get_submodule("base_model.model.model.layers.0")._adarank_graphs
    assert len(place.graphs.kinds) <= 10


def test_parameters_that_move_in_every_step_are_not_captured_for_ever():
    model = graphed(llama())
    for i in range(20):
        for _ in range(4):
            model(**tokens(2, 8, i)).loss.backward()
        for p in trained(model):
            p.data = p.data.clone()
    report = graph_report(model)
    assert report.reasons["parameters or modules change again and again"] > 8


def test_another_rank_in_a_later_block():
    """Seen while the first block is under way: autograd forgets the old shape, and it goes on."""
    model = llama()

    def run(m, i):
        if i in (4, 9):
            layer = m.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            A.grad = B.grad = None
            A.data, B.data = torch.randn(i, A.shape[1]) * 0.1, torch.randn(B.shape[0], i) * 0.1
        return step(m, tokens(2, 8, i))

    assert graph_report(both(model, run, 14)).graphed_calls >= 2 * 6


def test_outputs_that_the_caller_sees_are_its_own():
    """The last block's, and those that a hook on the block itself gets."""
    torch.manual_seed(0)
    model = graph_with(Skip(), StandIn())
    seen = []
    model.blocks[1].register_forward_hook(lambda _, args, output: seen.append(output[0]))
    x, scale = torch.randn(3, 6, requires_grad=True), torch.ones(6)
    for i in range(4):
        last, _ = model.blocks[3](x * i, scale, {"twice": True})
        output, kept = model(x * i, scale)
        values = [t.detach().clone() for t in (last, seen[-1], kept[3])]
        (output.sum() + last.sum()).backward()
        for _ in range(2):
            model(x, scale)[0].sum().backward()
        assert_close([t.detach() for t in (last, seen[-3], kept[3])], values)
    assert graph_report(model).graphed_calls > 20
