"""Groups of fused layers: who is in one, and what must not break it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import adarank_fast as ada
from adarank_fast.adapters import fused_linear as fused_layers
from adarank_fast.adapters import members
from tests.adapters.fused_models import (
    assert_equal,
    fusable,
    gradients,
    loss_of,
    mixed,
    reasons,
)
from tests.tiny_models import VOCABULARY, batch


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


def test_a_new_scaling_of_the_same_value_keeps_the_group():
    plain = mixed("llama", lora_dropout=0.0)
    fused = ada.accelerate(copy.deepcopy(plain), example=batch("llama"))
    for model in (plain, fused):
        for layer in fusable(model):
            layer.scaling = {name: float(str(value)) for name, value in layer.scaling.items()}
    for _ in range(4):
        assert_equal(gradients(fused, "llama"), gradients(plain, "llama"))
    assert not any(m._adarank.group.missed for m in fusable(fused) if m._adarank.group)
    assert max(len(layer.group) for layer in ada.fusion_report(fused).values()) == 3


class Reads(nn.Module):
    """a, b and c read one tensor; b and c only while `all_read`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.all_read = True

    def forward(self, x):
        y = self.a(x)
        return self.d(y + self.b(x) + self.c(x) if self.all_read else y)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("between", [0, 4])
def test_a_group_is_not_dissolved_while_a_forward_may_be_repeated(reentrant, between):
    """`between` a checkpointed forward and its backward pass members stay away, too."""
    config = LoraConfig(target_modules=["a", "b", "c", "d"], init_lora_weights=False)
    plain = get_peft_model(Reads(), config)
    example = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    fused = ada.accelerate(copy.deepcopy(plain), example={"x": example})
    for step in range(8):
        found = []
        for model in (fused, plain):
            model.zero_grad()
            inner, x = model.base_model.model, example.clone().requires_grad_()
            inner.all_read = step in (0, 5)
            loss = checkpoint(model, x, use_reentrant=reentrant).sin().sum()
            inner.all_read = False
            for _ in range(between):
                model(example).sum()
            inner.all_read = step in (0, 5)
            loss.backward()
            trained = [p.grad for p in model.parameters() if p.grad is not None]
            found.append([x.grad, *trained])
        torch.testing.assert_close(*found)


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
    assert not any(m._adarank.group.missed for m in fusable(fused) if m._adarank.group)


def test_checkpointing_under_gradients_of_the_adapters_alone():
    """A forward that is repeated inside `autograd.grad` keeps what the first one kept."""
    plain = mixed("llama", lora_dropout=0.0)
    fused = ada.accelerate(copy.deepcopy(plain))
    found = []
    for model in (plain, fused):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(loss_of(model, "llama"), inputs))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


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
@pytest.mark.parametrize("before", ["nothing", "no_grad", "inference", "train"])
def test_a_group_is_known_before_its_first_layer_is_computed(reentrant, before):
    """A forward and its repetition draw the same dropout masks, whatever was called before."""
    config = LoraConfig(
        r=2, target_modules=["a", "b", "c"], lora_dropout=0.5, init_lora_weights=False
    )
    fused = ada.accelerate(get_peft_model(Odd(), config)).train()
    x = torch.randn(4, 6, requires_grad=True)
    if before in ("no_grad", "inference"):
        with torch.no_grad() if before == "no_grad" else torch.inference_mode():
            fused(torch.randn(4, 6))
    elif before == "train":
        fused(torch.randn(4, 6)).sum().backward()
    found = []
    for call in (lambda x: checkpoint(fused, x, use_reentrant=reentrant), fused, fused):
        fused.zero_grad()
        torch.manual_seed(5)
        call(x).square().sum().backward()
        found.append({n: p.grad for n, p in fused.named_parameters() if p.grad is not None})
    for gradient in found[1:]:
        assert_equal((1.0, gradient), (1.0, found[0]))


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
    assert fused_layers.thread.waiting is None


def test_an_exception_leaves_the_groups_sound():
    fused = ada.accelerate(mixed("llama"), example=batch("llama"))
    expected = gradients(fused, "llama")
    layer = next(m for m in fusable(fused) if m._adarank.position == 1)

    def fail(module, args):
        raise RuntimeError("out of memory")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss_of(fused, "llama")
    handle.remove()
    assert_equal(gradients(fused, "llama"), expected)
    assert fused_layers.thread.waiting is None
    assert not any(m._adarank.group.missed for m in fusable(fused) if m._adarank.group)


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


@pytest.mark.parametrize("plain_base", [True, False])  # False: as of a quantised one
def test_layers_called_by_themselves_while_adapters_are_switched(plain_base, monkeypatch):
    """Nobody's forward ends in between, so outputs may still wait when the adapter is another."""
    torch.manual_seed(0)
    if not plain_base:
        monkeypatch.setattr(members, "has_plain_base", lambda layer: False)
    config = LoraConfig(r=2, target_modules=["a", "b", "c"])
    plain = get_peft_model(Odd(), config)
    plain.add_adapter("other", config)
    for name, parameter in plain.named_parameters():
        nn.init.normal_(parameter) if "lora_B" in name else None
    x = torch.randn(4, 6)
    fused = ada.accelerate(copy.deepcopy(plain), example={"x": x})

    def scenarios(model):
        inner = model.base_model.model
        layers = inner.a, inner.b, inner.c
        found = [inner.a(x)]
        with model.disable_adapter():
            found += [inner.b(x)]
        found += [layer(x) for layer in layers[:1]]
        with model.disable_adapter():
            found += [layer(x) for layer in layers]
        found += [inner.a(x)]
        model.set_adapter("other")
        found += [inner.b(x), inner.c(x)]
        model.set_adapter("default")
        return [*found, *(layer(x) for layer in layers)]

    for ours, exact in zip(scenarios(fused), scenarios(plain), strict=True):
        torch.testing.assert_close(ours, exact)


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


@pytest.mark.parametrize(
    "change", ["weight", "adapter", "scale", "base", "dtype", "in place", "deleted"]
)
def test_what_is_known_of_a_layer_is_found_out_again(change):
    """Every change after calls that were fused is seen by the next one, alone and in a group."""
    torch.manual_seed(0)
    plain = get_peft_model(Odd(), LoraConfig(r=2, target_modules=["a", "b", "c"]))
    for name, parameter in plain.named_parameters():
        nn.init.normal_(parameter) if "lora_B" in name else None
    x = torch.randn(4, 6)
    fused = ada.accelerate(copy.deepcopy(plain), example={"x": x})
    fused(x)
    before = fused(x)
    for model in (plain, fused):
        torch.manual_seed(1)
        layer = model.base_model.model.b
        if change == "weight":
            layer.lora_A["default"].weight = nn.Parameter(torch.randn(2, 6))
        elif change == "adapter":
            layer.lora_B["default"] = nn.Linear(2, 5, bias=False)
        elif change == "scale":
            layer.set_scale("default", 3.0)
        elif change == "base":
            layer.base_layer = nn.Linear(6, 5)
        elif change == "dtype":
            model.double()
        elif change == "in place":
            layer.lora_B["default"].weight.data = torch.randn(5, 2)
        else:
            del layer.lora_A["default"], layer.lora_B["default"]
    x = x.double() if change == "dtype" else x
    for _ in range(2):
        torch.testing.assert_close(fused(x), plain(x))
    if change != "dtype":
        assert not torch.allclose(fused(x), before)
    assert not reasons(fused)


def test_dropout_follows_the_mode():
    fused = get_peft_model(Odd(), LoraConfig(r=2, target_modules=["a", "b", "c"], lora_dropout=0.5))
    for name, parameter in fused.named_parameters():
        nn.init.normal_(parameter) if "lora_B" in name else None
    x = torch.randn(4, 6)
    ada.accelerate(fused, example={"x": x})
    for _ in range(2):
        assert torch.equal(fused.eval()(x), fused(x))
        assert not torch.equal(fused.train()(x), fused(x))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_base_that_is_unfrozen_later_gets_its_gradient(name):
    torch.manual_seed(0)
    plain = get_peft_model(Odd(), LoraConfig(r=2, target_modules=["a", "b", "c"]))
    x = torch.randn(4, 6)
    fused = ada.accelerate(copy.deepcopy(plain), example={"x": x})
    fused(x).sum().backward()
    for model in (plain, fused):
        for layer in (model.base_model.model.a, model.base_model.model.b):
            getattr(layer.base_layer, name).requires_grad_()
        model.zero_grad()
        model(x).square().sum().backward()
    for ours, exact in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (exact.grad is None)
        if exact.grad is not None:
            torch.testing.assert_close(ours.grad, exact.grad)
