"""Blocks as graphs, with a stand-in for CUDA's: the same numbers as eager ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.adapters import graphs as graphs_module
from adarank_fast.adapters.graph_blocks import graph_report, graph_with
from tests.adapters.fused_models import assert_equal, gradients, mixed
from tests.adapters.graph_stand_in import StandIn
from tests.adapters.graphed_models import (
    assert_close,
    both,
    grads_of,
    graphed,
    llama,
    step,
    tokens,
    trained,
)
from tests.tiny_models import batch


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5"])
def test_gradients_are_those_of_eager_blocks(kind, fuse):
    plain = mixed(kind, lora_dropout=0.3)
    if fuse:
        ada.accelerate(plain, example=batch(kind))
    plain.config.use_cache = False
    if kind == "t5":
        plain.get_base_model().decoder.config.use_cache = False
    model = graphed(plain)
    for i in range(4):
        assert_equal(gradients(model, kind, seed=i), gradients(plain, kind, seed=i))
    report, blocks = graph_report(model), 4 if kind == "t5" else 2
    assert report.blocks == blocks and report.graphed_calls == 2 * blocks, str(report)


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_a_base_in_16_bits(adapters):
    model = llama(lora_dropout=0.3)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(adapters if "lora_" in name else torch.bfloat16)
    both(model, lambda m, i: step(m, tokens(2, 8, i)))


def test_accumulated_micro_batches_with_evaluation_between_and_a_short_last_batch():
    """Gradients of micro-batches add up; what is not graphed does not disturb what is."""

    def run(model, i):
        model.zero_grad()
        found = []
        for j in range(4):
            inputs = tokens(1 if (i, j) == (3, 3) else 2, 8, 10 * i + j)
            found.append(model(**inputs).loss)
            found[-1].backward()
            model.eval()
            with torch.no_grad():
                found.append(model(**tokens(2, 8, 99)).loss)
            model.train()
        return [*found, *grads_of(model)]

    model = both(llama(lora_dropout=0.3), run)
    report = graph_report(model)
    assert report.graphed_calls == 2 * (16 - 2 - 1) and report.shapes == {(2, 8): 2}
    assert report.reasons["no gradients: evaluation or generation"] == 32
    assert all(p.grad._base is None or p.grad._base.numel() for p in trained(model))
    assert "2 blocks, " in str(report) and "shapes: 2 x 8" in str(report)


def test_a_training_run_ends_at_the_same_parameters():
    models = [llama(lora_dropout=0.2)]
    models.append(graphed(models[0]))
    for model in models:
        optimiser = torch.optim.AdamW(trained(model), lr=1e-2)
        for i in range(6):
            torch.manual_seed(i)
            step(model, tokens(2, 8, i))
            optimiser.step()
    assert_close(*(map(torch.Tensor.detach, trained(model)) for model in models))


@pytest.mark.parametrize("first", [(2, 8), (2, 6)])
def test_two_forwards_before_their_backward(first):
    """The second goes its eager way, or is captured behind the first; both are right."""

    def run(model, i):
        model.zero_grad()
        losses = [model(**tokens(*shape, i)).loss for shape in (first, (2, 8), first)]
        sum(losses).backward()
        return [*losses, *grads_of(model)]

    model = both(llama(), run, 5)
    reasons = graph_report(model).reasons
    assert reasons["an earlier forward still waits for its backward pass"] > 0


def test_shapes_in_turn_and_more_than_there_may_be():
    model = both(llama(), lambda m, i: step(m, tokens(2, 6 + i % 3, i)), 12)
    assert graph_report(model).shapes == {(2, 6): 2, (2, 7): 2, (2, 8): 2}
    for length in range(10, 18):
        for _ in range(3):
            step(model, tokens(1, length))
    report = graph_report(model)
    assert len(report.shapes) == graphs_module.MOST_SHAPES
    assert "pad_to_multiple_of" in str(report)
    chosen = graphed(llama(), [(2, 8)])
    for length in (6, 8, 6, 8, 6, 8):
        step(chosen, tokens(2, length))
    report = graph_report(chosen)
    assert report.shapes == {(2, 8): 2} and report.reasons["a shape that was not captured"] == 6


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing(reentrant, dropout):
    model = llama(lora_dropout=dropout)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours = both(model, lambda m, i: step(m, tokens(2, 8, i)))
    report = graph_report(ours)
    assert (report.graphed_calls == 4) == (not reentrant and not dropout), str(report)


def test_tensors_that_are_kept_keep_their_values():
    model = graphed(llama())
    for i in range(3):
        step(model, tokens(2, 8, i))
    outputs = [model(**tokens(2, 8, i), output_hidden_states=True) for i in (1, 2)]
    kept = [[h.detach().clone() for h in output.hidden_states] for output in outputs]
    outputs[0].loss.backward()
    for i in range(3):
        step(model, tokens(2, 8, i))
    for output, values in zip(outputs, kept, strict=True):
        assert_close([h.detach() for h in output.hidden_states], values)
    assert all(bool(h.isfinite().all()) for values in kept for h in values)


def test_changed_parameters_adapters_and_hooks_are_seen():
    model = llama()
    model.add_adapter("other", model.peft_config["default"])
    seen = []

    def run(m, i):
        if i == 4:
            for p in trained(m):
                p.data = p.data * 1.5
        if i == 8:
            m.set_adapter("other")
        if i == 12:
            m.set_adapter("default")
            layer = m.get_submodule("base_model.model.model.layers.1.mlp.act_fn")
            m.hook = layer.register_forward_hook(lambda *_: seen.append(1))
        if i == 14:
            m.hook.remove()
            m.hook = None
        return step(m, tokens(2, 8, i))

    ours = both(model, run, 18)
    report = graph_report(ours)
    assert len(seen) == 4  # two steps of both
    assert report.reasons["hooks inside of the block"] == 2
    assert report.graphed_calls >= 2 * 6, str(report)


def test_autocast():
    model = llama()

    def run(m, i):
        with torch.autocast("cpu", torch.bfloat16, enabled=i % 4 != 3):
            return step(m, tokens(2, 8, i))

    assert graph_report(both(model, run, 6)).graphed_calls >= 4


def test_under_hooks_for_saved_tensors():
    def run(m, i):
        with torch.autograd.graph.save_on_cpu():
            return step(m, tokens(2, 8, i))

    reasons = graph_report(both(llama(), run)).reasons
    assert reasons == {"hooks for saved tensors, not of this block's checkpointing alone": 8}


def test_generation_and_caches_are_eager():
    model = graphed(llama())
    model.config.use_cache = True
    for i in range(3):
        step(model, tokens(2, 8, i))
    assert graph_report(model).reasons == {"an argument is a DynamicCache": 6}
    model.eval()
    ids = tokens(2, 5)["input_ids"]
    expected = ada.restore(copy.deepcopy(model)).generate(input_ids=ids, max_new_tokens=4)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4), expected)


def test_a_capture_that_fails_leaves_the_eager_path():
    class Breaks(StandIn):
        def capture(self, run):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    class Large(StandIn):
        def capture(self, run):
            raise torch.OutOfMemoryError("CUDA out of memory")

    plain = llama()
    for backend, said in (
        (Breaks(), "the capture failed: operation not permitted when stream is capturing"),
        (Large(), "too little memory for its graphs"),
    ):
        model = graph_with(copy.deepcopy(plain), backend)
        for i in range(4):
            assert_close(step(model, tokens(2, 8, i)), step(plain, tokens(2, 8, i)))
        assert graph_report(model).reasons[said] == 4


def test_copies_pickles_and_restore():
    plain = llama()
    model = graphed(plain)
    for i in range(3):
        step(model, tokens(2, 8, i))
    twin = copy.deepcopy(model)
    assert graph_report(twin).graphed_calls == 0 and repr(model) == repr(plain)
    for i in range(4):
        assert_close(step(twin, tokens(2, 8, i)), step(model, tokens(2, 8, i)))
    block = model.get_submodule("base_model.model.model.layers.0")
    assert type(pickle.loads(pickle.dumps(block))).__module__.startswith("transformers")
    assert model.state_dict().keys() == plain.state_dict().keys()
    ada.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in ada.restore(plain).modules()]
    with pytest.raises(ada.AdarankError, match=r"call adarank_fast.graph_blocks\(peft_model\)"):
        graph_report(model)


def test_called_twice_it_starts_anew():
    model = graphed(llama())
    step(model, tokens(2, 8))
    classes = [type(m) for m in model.modules()]
    graph_with(model, StandIn())
    assert [type(m) for m in model.modules()] == classes
    assert graph_report(model).eager_calls == 0


def test_refusals():
    model = llama()
    with pytest.raises(ada.AdarankError, match="one CUDA device; it is on cpu"):
        ada.graph_blocks(model)
    for shapes, said in (([8], "shapes has 8"), ([(0, 8)], "shapes has"), ([], "is empty")):
        with pytest.raises(ada.AdarankError, match=said):
            ada.graph_blocks(model, shapes=shapes)
    with pytest.raises(ada.AdarankError, match="has no ModuleList"):
        graph_with(nn.Linear(2, 2), StandIn())
    with pytest.raises(ada.AdarankError, match="is a DataParallel; graph_blocks first, then wrap"):
        graph_with(nn.DataParallel(model), StandIn())
    compiled = llama()
    compiled.get_submodule("base_model.model.model.layers.0").compile(backend="eager")
    with pytest.raises(ada.AdarankError, match="layers.0 is compiled; use graph_blocks or"):
        graph_with(compiled, StandIn())
    model.get_submodule("base_model.model.lm_head").weight.ds_id = 1
    with pytest.raises(ada.AdarankError, match="partitioned by DeepSpeed ZeRO-3"):
        graph_with(model, StandIn())
