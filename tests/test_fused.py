"""Accelerated PEFT models: the same numbers as plain PEFT, and the same behaviour around them."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import adarank_fast as ada
from tests.models import VOCABULARY, batch, tiny

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}


def mixed(kind, lora_dropout=0.0, **kwargs):
    """A PEFT model with ranks from 1 to 7 in turn, B not zero."""
    model = tiny(kind, layers=2)
    targets = TARGETS[kind]
    config = LoraConfig(
        r=4,
        target_modules=targets,
        rank_pattern={name: 1 + 2 * (i % 4) for i, name in enumerate(targets)},
        alpha_pattern={name: 3 + i for i, name in enumerate(targets)},
        lora_dropout=lora_dropout,
        **{"fan_in_fan_out": kind == "gpt2", **kwargs},
    )
    torch.manual_seed(3)
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft_model.train()


def loss_of(model, kind, seed=0):
    inputs = batch(kind, seed=seed)
    if kind == "bert":
        hidden = model(**inputs).last_hidden_state
        return (hidden * torch.linspace(-1, 1, hidden.shape[-1])).tanh().mean()
    labels = inputs["decoder_input_ids"] if kind == "t5" else inputs["input_ids"]
    return model(**inputs, labels=labels).loss


def gradients(model, kind, seed=11):
    model.zero_grad()
    torch.manual_seed(seed)  # the models have dropout of their own
    loss = loss_of(model, kind)
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_equal(first, second, tolerance=1e-5):
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    assert first[1].keys() == second[1].keys()
    for name, grad in first[1].items():
        assert (grad - second[1][name]).norm() <= tolerance * second[1][name].norm() + 1e-9, name


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


def test_groups_of_a_llama_and_a_t5():
    model = mixed("llama")
    ada.accelerate(model, example=batch("llama"))
    assert model.training
    groups = {layer.group for layer in ada.fusion_report(model).values()}
    last_parts = {tuple(name.rsplit(".", 1)[-1] for name in group) for group in groups}
    assert last_parts == {
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    }
    t5 = mixed("t5")
    ada.accelerate(t5, example=batch("t5"))
    for path, layer in ada.fusion_report(t5).items():
        if "EncDecAttention.k" in path:  # every layer's k and v read one tensor: no group across
            assert [name.rsplit(".", 1)[-1] for name in layer.group] == ["k", "v"]
            assert len({name.rsplit(".", 1)[0] for name in layer.group}) == 1


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


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    plain = mixed("llama", lora_dropout=0.0)
    fused = ada.accelerate(copy.deepcopy(plain))
    expected = gradients(plain, "llama")
    fused.enable_input_require_grads()
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        assert_equal(gradients(fused, "llama"), expected)
    groups = {layer.group for layer in ada.fusion_report(fused).values()}
    assert max(map(len, groups)) == 3
    assert all(m._adarank.group is None or m._adarank.group.whole for m in fusable(fused))


def test_checkpointing_replays_dropout():
    """The recomputed forward must drop the same elements, or the gradients are wrong."""
    fused = ada.accelerate(mixed("llama", lora_dropout=0.3), example=batch("llama"))
    expected = gradients(fused, "llama", seed=7)
    fused.enable_input_require_grads()
    fused.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(gradients(fused, "llama", seed=7), expected)
    assert gradients(fused, "llama", seed=8)[0] != expected[0]
    fused.eval()
    assert loss_of(fused, "llama").item() == loss_of(fused, "llama").item()


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_before_a_backward_under_checkpointing(reentrant):
    plain = mixed("llama")
    fused = ada.accelerate(copy.deepcopy(plain))
    fused.enable_input_require_grads()
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(3):
        grads = []
        for model in (plain, fused):
            model.zero_grad()
            (loss_of(model, "llama", 1) + loss_of(model, "llama", 2)).backward()
            grads.append(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
        assert_equal((1.0, grads[1]), (1.0, grads[0]))
    assert any(m._adarank.group for m in fusable(fused))


def fusable(model):
    return [m for m in model.modules() if hasattr(m, "_adarank")]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generation_with_a_cache(kind):
    plain = mixed(kind).eval()
    fused = ada.accelerate(copy.deepcopy(plain), example=batch(kind))
    prompt = {k: v for k, v in batch(kind, lengths=(5, 5)).items() if "decoder" not in k}
    arguments = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=VOCABULARY - 1)
    assert torch.equal(plain.generate(**prompt, **arguments), fused.generate(**prompt, **arguments))


def test_nothing_outlives_a_forward():
    fused = ada.accelerate(mixed("llama"), example=batch("llama"))
    seen = []
    layer = next(m for m in fusable(fused) if m._adarank.group)
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
    loss_of(fused, "llama").backward()
    handle.remove()
    gc.collect()
    assert seen and all(reference() is None for reference in seen)
    for layer in fusable(fused):
        group = layer._adarank.group
        assert group is None or (group._input is None and not group._outputs)


def test_an_exception_leaves_the_groups_sound():
    fused = ada.accelerate(mixed("llama"), example=batch("llama"))
    expected = gradients(fused, "llama")
    layer = next(m for m in fusable(fused) if m._adarank.place == 1)

    def fail(module, args):
        raise RuntimeError("out of memory")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss_of(fused, "llama")
    handle.remove()
    assert all(m._adarank.group is None or not m._adarank.group._outputs for m in fusable(fused))
    assert_equal(gradients(fused, "llama"), expected)
    assert all(m._adarank.group is None or m._adarank.group.whole for m in fusable(fused))


class Odd(nn.Module):
    """Calls its layers as it is told, on one input or on copies."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 5) for _ in range(3))
        self.order, self.copies = "abc", False

    def forward(self, x):
        total = 0.0
        for name in self.order:
            total = total + getattr(self, name)(x.clone() if self.copies else x)
            if self.copies == "in place":
                x += 1
        return total


@pytest.mark.parametrize("order", ["abc", "cba", "bca", "ab", "bc", "c", "aabbcc"])
@pytest.mark.parametrize("copies", [False, True, "in place"])
def test_other_orders_members_and_inputs(order, copies):
    torch.manual_seed(0)
    plain = get_peft_model(Odd(), LoraConfig(r=2, target_modules=["a", "b", "c"]))
    for name, parameter in plain.named_parameters():
        nn.init.normal_(parameter) if "lora_B" in name else None
    fused = ada.accelerate(copy.deepcopy(plain), example={"x": torch.randn(4, 6)})
    assert {len(layer.group) for layer in ada.fusion_report(fused).values()} == {3}
    for model in (plain, fused):
        model.base_model.model.order, model.base_model.model.copies = order, copies
    for _ in range(2):
        x = torch.randn(4, 6)
        torch.testing.assert_close(fused(x.clone()), plain(x.clone()))


@pytest.mark.parametrize("mode", ["no_grad", "autocast", "inference"])
def test_an_output_is_not_handed_out_in_another_mode(mode):
    torch.manual_seed(0)
    plain = get_peft_model(Odd(), LoraConfig(r=2, target_modules=["a", "b", "c"]))
    x = torch.randn(4, 6)
    fused = ada.accelerate(copy.deepcopy(plain), example={"x": x})
    for model in (plain, fused):
        inner = model.base_model.model
        if mode == "no_grad":
            with torch.no_grad():
                inner.a(x)
            assert inner.b(x).requires_grad
        elif mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                assert inner.a(x).dtype == torch.bfloat16
            assert inner.b(x).dtype == torch.float32
        else:
            with torch.inference_mode():
                y = x.clone()
                inner.a(y)
                y.add_(1)
                torch.testing.assert_close(inner.b(y), inner.b(x + 1))


def test_members_with_dropouts_of_their_own():
    fused = get_peft_model(Odd(), LoraConfig(r=2, target_modules=["a", "b", "c"], lora_dropout=0.5))
    for name, parameter in fused.named_parameters():
        nn.init.normal_(parameter) if "lora_B" in name else None
    x = torch.randn(4, 6)
    ada.accelerate(fused, example={"x": x})
    fused.train()
    inner = fused.base_model.model
    inner.b.eval()
    inner.order = "b"
    expected = fused(x)
    inner.a(x)
    assert torch.equal(inner.b(x), expected)
    assert not torch.equal(inner.c(x), inner.c(x))


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


def accelerated(**kwargs):
    return ada.accelerate(mixed("llama", **kwargs), example=batch("llama"))


def reasons(model):
    return set().union(*(layer.reasons for layer in ada.fusion_report(model).values()))


def logits(model):
    with torch.no_grad():
        return model(**batch("llama")).logits


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
    assert "several active adapters" in reasons(fused)
    merged = fused.merge_and_unload()
    assert not fusable(merged)
    ada.restore(merged)
    assert not any(module._forward_hooks for module in merged.modules())
    assert logits(merged).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (dict(use_dora=True), "a LoRA variant (DoraLinearVariant)"),
        (dict(lora_bias=True), "lora_bias"),
    ],
)
def test_variants_fall_back(arguments, reason):
    plain = mixed("llama", **arguments)
    fused = ada.accelerate(copy.deepcopy(plain))
    assert_equal(gradients(fused, "llama"), gradients(plain, "llama"))
    assert reasons(fused) == {reason}
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
