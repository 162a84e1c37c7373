"""Graphs around what PEFT puts into a block: other tuners, modules trained whole, layers."""

from __future__ import annotations

import copy
import inspect
import io

import peft
import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.adapters.gated_mlp import gated_mlps
from adarank_fast.adapters.graph_blocks import graph_report, graph_with
from adarank_fast.adapters.peft_private import MontecloraSampler
from tests.adapters.graph_stand_in import StandIn, Tape
from tests.adapters.graphed_models import assert_close, trained


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.second(self.first(x).sin())


class Gated(nn.Module):
    """A block that is a gated MLP."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Blocks(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(make() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def step(model, seed):
    model.zero_grad()
    torch.manual_seed(seed)
    x = torch.randn(3, 6, requires_grad=True)
    output = model(x)
    output.sin().sum().backward()
    return [
        output.detach(),
        x.grad,
        *(p.grad.clone() for p in trained(model) if p.grad is not None),
    ]


TARGETS = ["first", "second"]
CONFIGS = {
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=9),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["second"]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=TARGETS, r=2, init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(target_modules=TARGETS, r=2, init_weights=False),
    "OFT": lambda: peft.OFTConfig(target_modules=TARGETS, r=2, oft_block_size=0),
    "VeRA": lambda: peft.VeraConfig(target_modules=TARGETS, r=2, init_weights=False),
    "DoRA": lambda: peft.LoraConfig(target_modules=TARGETS, r=2, use_dora=True),
}


@pytest.mark.parametrize("backend", [StandIn, Tape])
@pytest.mark.parametrize("kind", CONFIGS)
def test_other_tuners_and_what_is_switched_in_them(kind, backend):
    plain = peft.get_peft_model(Blocks(Block), CONFIGS[kind]())
    model = graph_with(copy.deepcopy(plain), backend())
    for i in range(12):
        if i == 4:
            for each in (model, plain):
                each.merge_adapter()
        if i == 8:
            for each in (model, plain):
                each.unmerge_adapter()
        if kind == "DoRA" and i == 6:
            for each in (model, plain):
                each.base_model.model.blocks[1].first.scale_layer(3.0)
        assert_close(step(model, i), step(plain, i))
    report = graph_report(model)
    if kind in ("LoHa", "LoKr") and backend is Tape:  # a number on the host decides on a dropout
        assert "_local_scalar_dense" in str(report) and report.graphed_calls == 4, str(report)
    else:
        assert report.graphed_calls >= 8, str(report)


@pytest.mark.skipif(
    "inference_mode" not in inspect.signature(peft.PeftModel.set_adapter).parameters,
    reason="PEFT that switches without training",
)
def test_a_module_that_is_trained_whole_may_be_switched_without_training():
    config = peft.LoraConfig(
        target_modules=["first"], modules_to_save=["second"], init_lora_weights=False
    )
    plain = peft.get_peft_model(Blocks(Block), config)
    plain.add_adapter("other", config)
    for name, parameter in plain.named_parameters():
        if "modules_to_save.other" in name:
            parameter.data.mul_(2)
    model = graph_with(copy.deepcopy(plain), Tape())
    for i in range(12):
        for each in (model, plain):
            each.set_adapter(["default", "other"][i // 4 % 2], inference_mode=True)
        assert_close(step(model, i), step(plain, i))
    assert graph_report(model).graphed_calls >= 8, str(graph_report(model))


@pytest.mark.parametrize("backend", [StandIn, Tape])
@pytest.mark.parametrize("kind", ["IA3", "LoRA", "VeRA"])
def test_a_forward_that_takes_merged_adapters_out_is_never_captured(kind, backend):
    """Its kind of call comes again and again; a replay would take them out each time."""
    lora = peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False)
    plain = peft.get_peft_model(Blocks(Block), lora if kind == "LoRA" else CONFIGS[kind]())
    for parameter in plain.base_model.model.blocks.parameters():
        parameter.requires_grad_()  # or nothing would be trained
    model = graph_with(copy.deepcopy(plain), backend())
    for i in range(6):
        for each in (model, plain):
            each.merge_adapter()
        with model.disable_adapter(), plain.disable_adapter():
            for j in range(3):
                assert_close(step(model, i + j), step(plain, i + j))
    report = graph_report(model)
    why = "merged adapters that are switched off, which its forward takes out"
    # merging puts other tensors into IA3's layers, so that no call ever comes for the third time
    assert report.reasons.get(why, 0) == (0 if kind == "IA3" else 8), str(report)


@pytest.mark.skipif(
    not issubclass(MontecloraSampler, nn.Module), reason="PEFT that has no Monteclora"
)
def test_samples_that_are_drawn_ahead_are_not_repeated():
    variant = peft.MontecloraConfig(num_samples=2, buffer_size=3)
    config = peft.LoraConfig(target_modules=TARGETS, r=4, monteclora_config=variant)
    plain = peft.get_peft_model(Blocks(Block), config)
    model = graph_with(copy.deepcopy(plain), StandIn())
    for i in range(9):
        assert_close(step(model, i), step(plain, i))
    assert graph_report(model).graphed_calls == 0


def test_a_scaling_that_is_a_tensor_is_read_anew():
    """On the host it would be a number in the graph."""
    config = peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False)
    model = graph_with(peft.get_peft_model(Blocks(Block), config), Tape())
    scaling = model.base_model.model.blocks[0].first.scaling
    scaling["default"] = torch.tensor(0.5)
    for i in range(4):
        step(model, i)
    report = graph_report(model)
    assert report.reasons["an adapter is scaled by a tensor"] == 2, str(report)
    assert report.graphed_calls == 2  # of the other block


@pytest.mark.parametrize("make", [Gated, lambda: nn.Linear(6, 6)])
def test_blocks_that_are_themselves_fused_layers_or_gated_mlps(make):
    """Graphs come last, whichever is called last, and `restore` takes all of it off."""
    targets = ["gate", "up", "down"] if make is Gated else ["0", "1"]
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    plain = peft.get_peft_model(Blocks(make), config)
    model = graph_with(ada.accelerate(copy.deepcopy(plain), recompute_mlp=make is Gated), StandIn())
    assert len(list(gated_mlps(model))) == 2 * (make is Gated)
    for i in range(5):
        torch.testing.assert_close(step(model, i), step(plain, i))
        ada.accelerate(model, recompute_mlp=make is Gated)
    assert graph_report(model).graphed_calls == 6
    assert sum(layer.fused_calls for layer in ada.fusion_report(model).values())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    classes = [type(m) for m in plain.modules()]
    assert [type(m) for m in loaded.modules()] == classes and repr(loaded) == repr(plain)
    ada.restore(model)
    assert [type(m) for m in model.modules()] == classes
    torch.testing.assert_close(step(model, 9), step(plain, 9))
    assert_close(step(loaded, 9), step(plain, 9))


def test_a_gated_mlp_that_is_trained_whole_is_copied_with_its_wrapper():
    """PEFT's wrappers find in the module that they wrap what they do not have themselves."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.mlp = nn.Linear(6, 6), Gated()

        def forward(self, x):
            return self.mlp(self.proj(x))

    config = peft.LoraConfig(target_modules=["proj"], modules_to_save=["mlp"])
    model = ada.accelerate(peft.get_peft_model(Outer(), config), recompute_mlp=True)
    assert len(list(gated_mlps(model))) == 2  # the original and the trained one
    whole = peft.get_peft_model(Gated(), peft.LoraConfig(target_modules=["up"]))
    for each in (model, ada.accelerate(whole, recompute_mlp=True)):
        again = copy.deepcopy(each)
        assert [type(m) for m in again.modules()] == [type(m) for m in each.modules()]
        assert_close(step(again, 1), step(each, 1))
