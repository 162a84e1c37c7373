"""Uniform adapters, plans as trainers' settings, merged models: loaded back by what reads them."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertForSequenceClassification,
    set_seed,
)

import adarank_fast as ada
from adarank_fast.adapters import export
from adarank_fast.adapters.adapter_files import read_adapter
from adarank_fast.plan.trainer_formats import export_plan, render
from tests.adapters.adapted import adapted, mixed_plan, output, randomise, shapes_in
from tests.tiny_models import batch, tiny


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("scaling", ["constant", "paper", "rslora"])
def test_uniform_is_the_same_function(kind, scaling, tmp_path):
    peft_model, inputs = adapted(kind, scaling), batch(kind)
    expected = output(peft_model, inputs)
    assert (expected - output(tiny(kind), inputs)).abs().max() > 0.05
    assert ada.export_uniform(peft_model, tmp_path / "out") == 16
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path / "out")
    torch.testing.assert_close(output(loaded, inputs), expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 16
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    layers = [m for m in loaded.modules() if isinstance(m, LoraLayer)]
    assert {layer.r["default"] for layer in layers} == {16}
    assert {layer.scaling["default"] for layer in layers} == {1.0}


def test_every_layer_of_a_kind_has_an_adapter(tmp_path):
    model = tiny("llama")
    plan = mixed_plan(model, ["q_proj", "down_proj"], ranks=(0, 0, 2, 0, 0))
    randomise(peft_model := ada.inject(model, plan))
    ada.export_uniform(peft_model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    kinds = {name.rsplit(".", 1)[-1] for name, rank in plan.ranks.items() if rank}
    assert config["target_modules"] == sorted(kinds)
    sizes = {"q_proj": (32, 32), "down_proj": (64, 32)}
    wanted = {}
    for layer in range(3):
        for kind in kinds:
            owner = "mlp" if kind == "down_proj" else "self_attn"
            path = f"base_model.model.model.layers.{layer}.{owner}.{kind}"
            wanted[f"{path}.lora_A.weight"] = (8, sizes[kind][0])
            wanted[f"{path}.lora_B.weight"] = (sizes[kind][1], 8)
    assert shapes_in(tmp_path / "out") == wanted
    zero = [not t.any() for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()]
    assert sum(zero) == len(wanted) - 2 * sum(rank > 0 for rank in plan.ranks.values())


def test_names_that_several_kinds_share():
    """BERT's three "dense" a layer: told apart where a suffix can, filled with zeros otherwise."""
    shapes = {
        p: (8, 8) if isinstance(m, nn.Linear) else None for p, m in tiny("bert").named_modules()
    }
    layer = "encoder.layer.0"
    adapted = [f"{layer}.attention.output.dense", f"{layer}.attention.self.query"]
    names, paths = export._targets(shapes, adapted)
    assert names == ["attention.output.dense", "query"]
    assert len(paths) == 6
    names, paths = export._targets(shapes, [f"{layer}.output.dense"])
    assert names == ["output.dense"]
    assert len(paths) == 6  # attention.output.dense comes along
    shapes = {"a.0": (8, 8), "a.1": (8, 8), "b.proj": None, "c.0.proj": (8, 8), "c.1.proj": (8, 8)}
    assert export._targets(shapes, ["a.1", "c.1.proj"])[0] == ["a.0", "a.1", "c.0.proj", "c.1.proj"]


def test_saved_and_live_adapters_export_the_same(tmp_path):
    peft_model = adapted("llama", "paper")
    peft_model.save_pretrained(tmp_path / "adapter")
    ada.export_uniform(peft_model, tmp_path / "live", rank=32)
    with torch.device("meta"):
        skeleton = type(tiny("llama"))(peft_model.config)
    adapter = read_adapter(tmp_path / "adapter")
    assert export.export_saved(adapter, skeleton, tmp_path / "saved", rank=32) == 32
    live, saved = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("live", "saved"))
    assert live.keys() == saved.keys()
    for name, tensor in live.items():
        assert torch.equal(tensor, saved[name])
    configs = [
        json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("live", "saved")
    ]
    assert configs[0] == configs[1]


def test_a_head_is_kept_and_an_adapter_chosen(tmp_path):
    set_seed(0)
    base = BertForSequenceClassification(tiny("bert").config)
    fresh, inputs = copy.deepcopy(base), batch("bert")
    peft_model = ada.inject(
        base, mixed_plan(base, "attention"), adapter_name="mine", task_type="SEQ_CLS"
    )
    randomise(peft_model)
    peft_model.base_model.model.classifier.modules_to_save["mine"].weight.data += 1
    ada.export_uniform(peft_model, tmp_path / "out", adapter_name="mine")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "out")
    torch.testing.assert_close(
        output(loaded, inputs), output(peft_model, inputs), rtol=0, atol=1e-5
    )


def test_bfloat16_stays(tmp_path):
    peft_model = adapted("llama").bfloat16()
    ada.export_uniform(peft_model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (8, "rank=8 is too small: .* has rank 11; use 16"),
        (12, "rank=12 is none of 8, 16, 32, 64"),
        (128, "rank=128 is none of"),
    ],
)
def test_ranks_that_do_not_do(rank, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ada.export_uniform(adapted("llama"), tmp_path / "out", rank)
    assert not os.listdir(tmp_path)


def test_kinds_that_do_not_do(tmp_path):
    for arguments, message in (
        (dict(use_dora=True), "has DoRA, which a plain LoRA adapter cannot express; merge"),
        (dict(lora_bias=True), "has a bias on lora_B"),
        (dict(bias="all"), "has trained biases"),
        (dict(init_lora_weights="pissa"), "changed by init_lora_weights='pissa'"),
        (dict(target_modules=["q_proj", "embed_tokens"]), "embed.* is not that of a linear layer"),
        (dict(r=128), "has rank 128, engines take 64 at most"),
    ):
        config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **arguments})
        with pytest.raises(ValueError, match=message):
            ada.export_uniform(get_peft_model(tiny("llama"), config), tmp_path / "out")
    with pytest.raises(
        ValueError, match="'other' is no LoRA adapter of the model; it has: default"
    ):
        ada.export_uniform(adapted("llama"), tmp_path / "out", adapter_name="other")
    with pytest.raises(ValueError, match="it has: none"):
        ada.export_uniform(tiny("llama"), tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_peft_format(tmp_path):
    model = tiny("llama")
    plan = mixed_plan(model)
    export_plan(plan, tmp_path / "adapter_config.json", scaling="paper")
    config = LoraConfig(**json.loads((tmp_path / "adapter_config.json").read_text()))
    assert config == LoraConfig.from_pretrained(tmp_path)
    found = get_peft_model(model, config)
    assert ranks_in(found) == {
        f"model.{name}": (rank, 8 / rank) for name, rank in plan.ranks.items() if rank
    }


def test_axolotl_format(tmp_path):
    """Read as axolotl does: YAML, then the fields that its adapter loader gives to PEFT."""
    model = tiny("llama")
    plan = mixed_plan(model)
    export_plan(plan, tmp_path / "lora.yaml", "axolotl", scaling="rslora")
    settings = yaml.safe_load((tmp_path / "lora.yaml").read_text())
    config = LoraConfig(
        r=settings["lora_r"],
        lora_alpha=settings["lora_alpha"],
        target_modules=settings["lora_target_modules"],
        rank_pattern=settings["lora_rank_pattern"],
        alpha_pattern=settings["lora_alpha_pattern"],
        use_rslora=settings["peft_use_rslora"],
    )
    assert settings["adapter"] == "lora"
    assert ranks_in(get_peft_model(model, config)) == {
        f"model.{name}": (rank, pytest.approx(8 / rank**0.5))
        for name, rank in plan.ranks.items()
        if rank
    }
    with pytest.raises(ValueError, match="axolotl takes whole numbers .* gives 3.3"):
        export_plan(plan, tmp_path / "other.yaml", "axolotl", scaling=0.3)
    assert os.listdir(tmp_path) == ["lora.yaml"]


def test_llama_factory_format():
    model = tiny("llama")
    settings = yaml.safe_load(render(mixed_plan(model, "attention", (0, 4)), "llama-factory"))
    assert (settings["lora_rank"], settings["lora_alpha"]) == (4, 8)
    config = LoraConfig(
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        target_modules=[name.strip() for name in settings["lora_target"].split(",")],
    )
    assert ranks_in(get_peft_model(model, config)) == {
        f"model.{name}": (4, 2.0)
        for name, rank in mixed_plan(tiny("llama"), "attention", (0, 4)).ranks.items()
        if rank
    }
    with pytest.raises(
        ValueError, match="one lora_rank .* plan has 1 to 11; .*adapter_name_or_path"
    ):
        render(mixed_plan(tiny("llama")), "llama-factory")
    with pytest.raises(
        ValueError, match="format='trl' is unknown; use one of peft, axolotl, llama"
    ):
        render(mixed_plan(tiny("llama")), "trl")


def ranks_in(peft_model):
    return {
        path: (layer.lora_A["default"].weight.shape[0], layer.scaling["default"])
        for path, layer in peft_model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }
