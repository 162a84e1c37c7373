"""Accelerated PEFT models: the same numbers as plain PEFT, and the same behaviour around them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

import adarank_fast as ada
from tests.adapters.fused_models import (
    TARGETS,
    accelerated,
    assert_equal,
    fusable,
    gradients,
    logits,
    loss_of,
    mixed,
    reasons,
)
from tests.tiny_models import batch, tiny


@pytest.mark.parametrize("kind", TARGETS)
def test_loss_and_gradients_are_plain_pefts(kind):
    plain = mixed(kind)
    fused = ada.accelerate(copy.deepcopy(plain))
    expected = gradients(plain, kind)
    for _ in range(3):  # the first watches, the next ones run in groups
        assert_equal(gradients(fused, kind), expected)
    report = ada.fusion_report(fused)
    assert report.fused_share == 1.0 and all(layer.fused for layer in report.values())
    assert {len(layer.group) for layer in report.values()} >= {"gpt2": {1}}.get(kind, {1, 3})
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_fifty_steps_stay_together(kind):
    plain = mixed(kind)
    fused = ada.accelerate(copy.deepcopy(plain))
    losses = []
    for model in (plain, fused):
        optimiser = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=3e-3, eps=1e-4
        )
        losses.append([])
        for step in range(50):
            optimiser.zero_grad()
            torch.manual_seed(step)
            loss = loss_of(model, kind, seed=step % 5)
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_a_replaced_forward_and_torch_func():
    fused = accelerated().eval()
    layer = fusable(fused)[0]
    before, x = layer.base_layer.forward, torch.randn(2, 3, 32)
    layer.base_layer.forward = lambda x: before(x) + 100
    assert layer(x).mean() > 50 and reasons(fused) == {"a forward replaced inside the layer"}
    del layer.base_layer.forward
    gradient = torch.func.grad(lambda x: layer(x).sum())(x)
    y = x.clone().requires_grad_()
    layer(y).sum().backward()
    torch.testing.assert_close(gradient, y.grad)


def test_prediction_beneath_fused_layers_still_folds():
    plain, fused = mixed("llama").eval(), accelerated().eval()
    plans = [
        ada.predict_ranks(m, [batch("llama")], 4, trials=1, progress=False) for m in (plain, fused)
    ]
    assert plans[0].settings["routes"] == plans[1].settings["routes"]
    assert plans[0].ranks == plans[1].ranks


def test_peft_features_fall_back_with_their_reason():
    plain, fused = mixed("llama").eval(), accelerated().eval()
    with fused.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(logits(fused), logits(plain))
    assert reasons(fused) == {"adapters disabled"}
    fused.merge_adapter()
    torch.testing.assert_close(logits(fused), logits(plain), atol=1e-4, rtol=1e-4)
    fused.unmerge_adapter()
    assert reasons(fused) == {"adapters disabled", "merged"}
    for model in (plain, fused):
        torch.manual_seed(0)
        model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS["llama"][:3]))
        model.set_adapter("other")
    torch.testing.assert_close(logits(fused), logits(plain))
    for model in (plain, fused):
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(fused), logits(plain))
    assert reasons(fused) == {"adapters disabled", "merged"}
    merged = fused.merge_and_unload()
    assert not fusable(merged)
    ada.restore(merged)
    assert not any(module._forward_hooks for module in merged.modules())
    assert logits(merged).isfinite().all()


def test_variants_fall_back():
    plain = mixed("llama", use_dora=True, lora_dropout=0.5)
    fused = ada.accelerate(copy.deepcopy(plain))
    assert_equal(gradients(fused, "llama"), gradients(plain, "llama"))
    assert reasons(fused) == {"DoRA with dropout"}
    assert ada.fusion_report(fused).fused_share == 0.0
    assert "0 of 14 LoRA layers fused" in str(ada.fusion_report(fused))


def test_hooks_inside_a_layer_are_called():
    fused, calls = accelerated(), []
    layer = fusable(fused)[0]
    layer.lora_A["default"].register_forward_hook(lambda *args: calls.append(1))
    loss_of(fused, "llama")
    assert calls == [1] and reasons(fused) == {"hooks inside the layer"}


def test_restore_is_plain_peft_again():
    plain = mixed("llama")
    fused = accelerated()
    before = {n: p.data_ptr() for n, p in fused.named_parameters()}
    assert ada.accelerate(fused) is fused  # a second time changes nothing
    ada.restore(fused)
    assert {n: p.data_ptr() for n, p in fused.named_parameters()} == before
    for (name, ours), (_, theirs) in zip(fused.named_modules(), plain.named_modules(), strict=True):
        assert type(ours) is type(theirs), name
        assert set(ours.__dict__) == set(theirs.__dict__)
        assert len(ours._forward_hooks) == len(theirs._forward_hooks)
    with pytest.raises(ValueError, match="call adarank_fast.accelerate"):
        ada.fusion_report(fused)


def test_save_load_deepcopy_and_pickle(tmp_path):
    fused = accelerated().eval()
    expected = logits(fused)
    fused.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny("llama", layers=2), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), expected)
    twin = copy.deepcopy(fused)
    torch.testing.assert_close(logits(twin), expected)
    groups = {id(m._adarank.group) for m in fusable(fused)} - {id(None)}
    assert not groups & {id(m._adarank.group) for m in fusable(twin)}
    torch.save(fused, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    torch.testing.assert_close(logits(whole), expected)
    assert not any(type(m).__module__.startswith("adarank") for m in whole.modules())  # PEFT's own


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_compiles_into_one_graph(kind):
    plain = mixed(kind)
    fused = ada.accelerate(copy.deepcopy(plain), example=batch(kind))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    expected = gradients(plain, kind)
    for _ in range(3):
        fused.zero_grad()
        torch.manual_seed(11)
        loss = loss_of(compiled, kind)
        loss.backward()
        grads = {n: p.grad for n, p in fused.named_parameters() if n in expected[1]}
        assert_equal((loss.item(), grads), expected)
    assert len(graphs) == 1


def test_compiling_before_groups_are_known_warns():
    plain = mixed("bert").eval()
    fused = ada.accelerate(copy.deepcopy(plain))
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="before its groups are known"):
        hidden = compiled(**batch("bert")).last_hidden_state
    torch.testing.assert_close(hidden, plain(**batch("bert")).last_hidden_state)


def test_bfloat16_base_with_float32_adapters():
    plain = mixed("llama")
    for name, parameter in plain.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    fused = ada.accelerate(copy.deepcopy(plain))
    loss, grads = gradients(fused, "llama")
    expected, plain_grads = gradients(plain, "llama")
    assert loss == pytest.approx(expected, rel=1e-2)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - plain_grads[name]).norm() < 0.06 * plain_grads[name].norm()


def test_autocast():
    plain, fused = mixed("llama"), accelerated()
    plain.eval(), fused.eval()
    exact = logits(copy.deepcopy(plain).double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = logits(fused), logits(plain)
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6
    assert (theirs - exact).norm() > 1e-4  # autocast was on


@pytest.mark.parametrize("known_to_peft", [True, False])
def test_four_bit_base(known_to_peft):
    import bitsandbytes as bnb

    model = tiny("llama", layers=2, width=64)
    for name in TARGETS["llama"]:
        for path, module in list(model.named_modules()):
            if path.endswith(name):
                quantised = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, quant_type="nf4"
                )
                quantised.load_state_dict(module.state_dict())
                model.set_submodule(path, quantised.to("cpu"))
    model.is_loaded_in_4bit = known_to_peft
    plan = ada.RankPlan.uniform(model, 3, target_modules=TARGETS["llama"])
    plain = ada.inject(model, plan)
    ada.restore(plain)
    for name, parameter in plain.named_parameters():
        nn.init.normal_(parameter, std=0.1) if "lora_B" in name else None
    expected = gradients(plain, "llama")
    ada.accelerate(plain)
    for _ in range(2):
        assert_equal(gradients(plain, "llama"), expected)
    assert ada.fusion_report(plain).fused_share == 1.0


def test_nothing_to_fuse():
    with pytest.raises(ValueError, match="BertModel has no LoRA layer"):
        ada.accelerate(tiny("bert"))


def test_the_report_shows_the_kernels_of_the_devices_in_use():
    fused = accelerated()
    report = ada.fusion_report(fused)
    assert report.kernels == {} and "Triton" not in str(report)  # the CPU uses none
    report.kernels = {"cuda:0": {"lora_shrink": "passed", "lora_drop": "not checked yet"}}
    assert "Triton kernels on cuda:0: lora_shrink passed, lora_drop not checked yet" in str(report)
