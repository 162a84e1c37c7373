"""`adarank export` and `adarank merge`: folders and files in, what reads them back out."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import adarank_fast as ada
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.plan.trainer_formats import render
from tests.adapters.adapted import mixed_plan, output, randomise, shapes_in
from tests.tiny_models import batch
from tests.tiny_texts import save_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A llama with tokenizer, a bert and its classifier, adapters for them, a plan."""
    root = tmp_path_factory.mktemp("export")
    for kind in ("llama", "bert"):
        save_tiny(kind, root / kind, layers=3)
    model = AutoModelForCausalLM.from_pretrained(root / "llama")
    plan = mixed_plan(model)
    plan.save(root / "plan.json")
    randomise(ada.inject(model, plan, task_type="CAUSAL_LM")).save_pretrained(root / "adapter")
    model = AutoModelForCausalLM.from_pretrained(root / "llama")
    dora = ada.inject(model, plan, use_dora=True, init_lora_weights=False)
    dora.save_pretrained(root / "dora")
    task = AutoModelForSequenceClassification.from_pretrained(root / "bert", num_labels=5)
    head = ada.inject(task, mixed_plan(task, "attention"), task_type="SEQ_CLS")
    randomise(head).save_pretrained(root / "head")
    return root


def reference(folders, adapter="adapter"):
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders / "llama"), folders / adapter
    )


def test_export_command(adarank, folders, tmp_path):
    done = adarank("export", folders / "adapter", "--uniform", "-o", "served")
    then = "Next: serve it as an adapter of rank 16, such as by vllm's --max-lora-rank 16\n"
    assert done == (0, "", f"wrote served\n{then}")
    assert sorted(os.listdir("served")) == ["adapter_config.json", "adapter_model.safetensors"]
    base = AutoModelForCausalLM.from_pretrained(folders / "llama")
    loaded, inputs = PeftModel.from_pretrained(base, "served"), batch("llama")
    expected = output(reference(folders), inputs)
    torch.testing.assert_close(output(loaded, inputs), expected, rtol=0, atol=1e-5)
    done = adarank("export", folders / "head", "--uniform", "--rank", 32, "-o", "head", "--json")
    assert done == (0, '{"export": "head", "rank": 32}\n', "")
    assert shapes_in(tmp_path / "head")["base_model.model.classifier.weight"] == (5, 32)


def test_export_needs_no_weights(adarank, folders, tmp_path):
    os.mkdir("base")
    (tmp_path / "base" / "config.json").write_text((folders / "llama" / "config.json").read_text())
    status, _, err = adarank(
        *("export", folders / "adapter", "--uniform", "-o", "served", "--base", "base")
    )
    assert (status, err.splitlines()[:-1]) == (0, ["wrote served"])


def test_export_plan_command(adarank, folders):
    status, out, err = adarank("export", folders / "plan.json", "--format", "axolotl")
    assert (status, err) == (0, "")
    assert out == render(RankPlan.load(folders / "plan.json"), "axolotl")
    done = adarank("export", folders / "plan.json", "-o", "lora.json", "--scaling", "0.5", "--json")
    assert done == (0, '{"export": "lora.json", "format": "peft"}\n', "")
    with open("lora.json") as file:
        assert json.load(file)["lora_alpha"] == 5.5


@pytest.mark.parametrize("adapter", ["adapter", "dora"])
def test_merge_command(adarank, folders, adapter):
    done = adarank("merge", folders / "llama", folders / adapter, "-o", "merged")
    then = "Next: adarank evaluate merged --data FILE\n"
    assert done == (0, "", f"wrote merged\n{then}")
    merged, inputs = AutoModelForCausalLM.from_pretrained("merged"), batch("llama")
    expected = output(reference(folders, adapter), inputs)
    torch.testing.assert_close(output(merged, inputs), expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained("merged")("word7 word9")["input_ids"] == [10, 12]
    assert not any("lora" in name for name in load_file("merged/model.safetensors"))


def test_merge_with_a_head(adarank, folders):
    status, out, err = adarank("merge", folders / "bert", folders / "head", "-o", "merged")
    assert (status, err.splitlines()[:-1]) == (0, ["wrote merged"])
    merged = AutoModelForSequenceClassification.from_pretrained("merged")
    task = AutoModelForSequenceClassification.from_pretrained(folders / "bert", num_labels=5)
    inputs = batch("bert")
    expected = output(PeftModel.from_pretrained(task, folders / "head"), inputs)
    torch.testing.assert_close(output(merged, inputs), expected, rtol=1e-4, atol=1e-4)


def test_merging_into_a_quantised_model_is_refused(adarank, folders, tmp_path):
    os.mkdir("quantised")
    config = json.loads((folders / "llama" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    status, _, err = adarank("merge", "quantised", folders / "adapter", "-o", "merged")
    assert status == 2 and "MODEL 'quantised' is quantised" in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["quantised"]


def test_weights_that_nobody_has_are_named(adarank, folders):
    task = AutoModelForSequenceClassification.from_pretrained(folders / "bert")
    config = LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION")
    get_peft_model(task.bert, config).save_pretrained("bare")
    os.mkdir("old")
    tensors = load_file(folders / "bert" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
    save_file(kept, "old/model.safetensors", metadata={"format": "pt"})
    with open("old/config.json", "w") as file:
        file.write((folders / "bert" / "config.json").read_text())
    status, _, err = adarank("merge", "old", "bare", "-o", "merged")
    assert status == 0
    assert "neither MODEL nor the adapter has weights for pooler.dense.bias, pooler.dense" in err


def test_an_existing_folder_is_not_touched(adarank, folders, tmp_path):
    os.mkdir("full")
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for command in (
        ("export", folders / "adapter", "--uniform"),
        ("merge", folders / "llama", folders / "adapter"),
    ):
        for out, message in (
            ("full", "is not empty"),
            ("file", "is a file"),
            ("a/b", "does not exist"),
        ):
            status, _, err = adarank(*command, "-o", out)
            assert status == 2 and message in err and err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]
    assert os.listdir("full") == ["precious"]
    os.mkdir("empty")
    assert adarank("export", folders / "adapter", "--uniform", "-o", "empty")[0] == 0
    assert os.listdir("empty")


def spoiled(folders, tmp_path, name, **config):
    """A copy of the adapter with another configuration and, if `name`, without one tensor."""
    target = tmp_path / "spoiled"
    target.mkdir()
    content = json.loads((folders / "adapter" / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**content, **config}))
    tensors = load_file(folders / "adapter" / "adapter_model.safetensors")
    left = {k: t for k, t in tensors.items() if name is None or not k.endswith(name)}
    assert name is None or len(left) < len(tensors)
    save_file(left, target / "adapter_model.safetensors")
    return target


DISAGREEMENTS = {
    "rank": (dict(rank_pattern={}), None, "has rank .*, the configuration says 11"),
    "half": ({}, "layers.1.self_attn.q_proj.lora_B.weight", "lora_B of .* do not belong together"),
    "more targets": (dict(target_modules=["norm"]), None, "is no target of its configuration"),
    "kind": (dict(peft_type="IA3"), None, "adapter_config.json in .* cannot be read|is IA3, not"),
    "base": (dict(base_model_name_or_path=""), None, "does not say what its base model is"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_adapters_that_disagree_with_themselves(adarank, folders, tmp_path, case):
    config, name, message = DISAGREEMENTS[case]
    spoiled(folders, tmp_path, name, **config)
    status, out, err = adarank("export", "spoiled", "--uniform", "-o", "served")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err), err
    assert os.listdir(tmp_path) == ["spoiled"]


def test_a_target_without_tensors(adarank, folders, tmp_path):
    path = "layers.1.self_attn.q_proj"
    target = spoiled(folders, tmp_path, f"{path}.lora_B.weight")
    tensors = load_file(target / "adapter_model.safetensors")
    del tensors[f"base_model.model.model.{path}.lora_A.weight"]
    save_file(tensors, target / "adapter_model.safetensors")
    for command in (("export", target, "--uniform"), ("merge", folders / "llama", target)):
        status, _, err = adarank(*command, "-o", "out")
        assert status == 2 and f"model.{path} of LlamaForCausalLM is a target" in err
    assert os.listdir(tmp_path) == ["spoiled"]


BAD = {
    "nothing": (["export", "nowhere"], "'nowhere' does not exist"),
    "no adapter": (["export", "{llama}", "--uniform", "-o", "x"], "no adapter_config.json"),
    "a folder of folders": (["export", "{}", "--uniform", "-o", "x"], "adapter' has one"),
    "no --uniform": (["export", "{adapter}", "-o", "x"], "give --uniform and -o FOLDER"),
    "no -o": (["export", "{adapter}", "--uniform"], "give --uniform and -o FOLDER"),
    "format": (["export", "{adapter}", "--format", "peft"], "--format is for plans"),
    "plan": (["export", "{plan.json}", "--uniform"], "are for adapter folders"),
    "unknown format": (["export", "{plan.json}", "--format", "x"], "format='x' is unknown"),
    "inexpressible": (["export", "{plan.json}", "--format", "llama-factory"], "one lora_rank"),
    "scaling": (["export", "{plan.json}", "--scaling", "x"], "scaling must be"),
    "rank": (["export", "{adapter}", "--uniform", "-o", "x", "--rank", "8"], "rank=8 is too small"),
    "dora": (["export", "{dora}", "--uniform", "-o", "x"], "has DoRA"),
    "base": (
        ["export", "{adapter}", "--uniform", "-o", "x", "--base", "some/model"],
        "configuration of the base model 'some/model'",
    ),
    "other base": (["export", "{adapter}", "--uniform", "-o", "x", "--base", "{bert}"], "not fit"),
    "merge nothing": (["merge", "{llama}", "nowhere", "-o", "x"], "'nowhere' is not a folder"),
    "merge into nothing": (["merge", "nowhere", "{adapter}", "-o", "x"], "base model 'nowhere'"),
    "merge into another": (["merge", "{bert}", "{adapter}", "-o", "x"], "does not fit"),
    "dtype": (["merge", "{llama}", "{adapter}", "-o", "x", "--dtype", "int3"], "--dtype 'int3'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(adarank, folders, tmp_path, case):
    arguments, message = BAD[case]
    filled = [folders / a[1:-1] if a[:1] == "{" else a for a in arguments]
    status, out, err = adarank(*filled)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("adarank: error: ") and message in err
    assert not os.listdir(tmp_path)


def test_help(adarank):
    for command in ("export", "merge"):
        status, out, _ = adarank(command, "--help")
        assert status == 0 and "Usage: " in out
