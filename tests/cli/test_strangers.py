"""Folders and files of strangers on the command line: nothing of theirs is run, nothing hangs."""

from __future__ import annotations

import builtins
import json
import shutil
import time

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import adarank_fast as ada
from adarank_fast.adapters import patterns
from adarank_fast.plan.rank_plan import RankPlan
from tests.adapters.adapted import output, randomise
from tests.tiny_models import batch, tiny
from tests.tiny_texts import EXAMPLES, save_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A llama, an adapter for it, a plan, texts, and a model that brings its own code."""
    root = tmp_path_factory.mktemp("strangers")
    save_tiny("llama", root / "llama")
    model = AutoModelForCausalLM.from_pretrained(root / "llama")
    plan = RankPlan.uniform(model, 2)
    plan.save(root / "plan.json")
    randomise(ada.inject(model, plan, task_type="CAUSAL_LM")).save_pretrained(root / "adapter")
    rows = [json.dumps({"text": text, "label": label}) for text, label in EXAMPLES[:20]]
    (root / "texts.jsonl").write_text("\n".join(rows))
    shutil.copytree(root / "llama", root / "odd")
    config = json.loads((root / "odd" / "config.json").read_text())
    names = {"AutoConfig": "Odd", "AutoModel": "OddModel", "AutoModelForCausalLM": "OddModel"}
    config |= {"model_type": "odd", "auto_map": {k: f"odd.{v}" for k, v in names.items()}}
    (root / "odd" / "config.json").write_text(json.dumps(config))
    (root / "odd" / "odd.py").write_text(
        "open('ran', 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Odd(LlamaConfig):\n    model_type = 'odd'\n"
        "class OddModel(LlamaForCausalLM):\n    config_class = Odd\n"
    )
    return root


COMMANDS = {
    "predict": ["predict", "odd", "--data", "texts.jsonl", "--trials", "1"],
    "train": ["train", "odd", "--data", "texts.jsonl", "--plan", "plan.json", "--max-steps", "1"],
    "compare": ["compare", "odd", "--data", "texts.jsonl"],
    "export": ["export", "adapter", "--uniform", "-o", "served", "--base", "odd"],
    "merge": ["merge", "odd", "adapter", "-o", "merged"],
}


def at(root, arguments):
    return [str(root / one) if (root / one).exists() else one for one in arguments]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_models_own_code_is_not_run_unasked(adarank, folders, command, monkeypatch, tmp_path):
    def asked(*prompt):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    status, _, err = adarank(*at(folders, COMMANDS[command]))
    *said, refusal = err.splitlines()
    assert status == 2 and len(said) <= 2 and "--trust-remote-code" in refusal
    assert not (tmp_path / "ran").exists()


def test_it_is_run_where_it_is_trusted(adarank, folders, tmp_path):
    status, _, err = adarank(*at(folders, COMMANDS["predict"]), "--trust-remote-code")
    assert status == 0, err
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
@pytest.mark.parametrize("pattern", ["^(([a-z_0-9.])+.)+[A-Z]([a-z])+$", "(a", "(.*)*(.*)*!"])
def test_patterns_that_take_for_ever(adarank, folders, tmp_path, field, pattern, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    shutil.copytree(folders / "adapter", "bomb")
    file = tmp_path / "bomb" / "adapter_config.json"
    config = json.loads(file.read_text())
    config[field] = {pattern: 2} if field == "rank_pattern" else pattern
    file.write_text(json.dumps(config))
    started = time.process_time()
    status, out, err = adarank(
        *("export", "bomb", "--uniform", "-o", "served", "--base", folders / "llama")
    )
    assert time.process_time() - started < 5
    assert (status, out) == (2, "") and err.count("\n") == 1
    said = "is no regular expression" if pattern == "(a" else "takes too long"
    assert f"the adapter's {field}" in err and said in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": "8"}, 'adapter_config.json\' is damaged: r is "8", no integer from 1 to'),
        ({"r": True}, "r is true, no integer"),
        ({"lora_alpha": float("nan")}, "NaN is no JSON number"),
        ({"rank_pattern": ["q"]}, 'rank_pattern is ["q"], no object'),
        ({"target_modules": {"q": 1}}, "target_modules is"),
        ({"peft_type": None}, "peft_type is null, no text"),
        ({"auto_mapping": {"base_model_class": [1]}}, "auto_mapping.base_model_class is [1]"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "Megatron"),
    ],
)
def test_a_configuration_of_other_types(adarank, folders, tmp_path, change, message):
    shutil.copytree(folders / "adapter", "changed")
    file = tmp_path / "changed" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    for command in (["export", "changed", "--uniform"], ["merge", "llama", "changed"]):
        status, out, err = adarank(*at(folders, command), "-o", "x")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err and "save_pretrained" in err


@pytest.mark.parametrize("mapped", ["pipeline", "utils", "AutoTokenizer", "TrainingArguments"])
def test_a_configuration_names_what_is_no_model(adarank, folders, tmp_path, mapped):
    shutil.copytree(folders / "adapter", "changed")
    file = tmp_path / "changed" / "adapter_config.json"
    mapping = {"base_model_class": mapped, "parent_library": "transformers.models"}
    config = {**json.loads(file.read_text()), "auto_mapping": mapping, "task_type": None}
    file.write_text(json.dumps(config))
    status, _, err = adarank(
        *("export", "changed", "--uniform", "-o", "served", "--base", folders / "llama")
    )
    assert (status, err.splitlines()[:-1]) == (0, ["wrote served"])  # by the checkpoint's own class


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite(adarank, folders, tmp_path, value):
    shutil.copytree(folders / "adapter", "changed")
    file = tmp_path / "changed" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][0, 0] = value
    save_file(tensors, file)
    status, _, err = adarank(*at(folders, ["merge", "llama"]), "changed", "-o", "merged")
    assert status == 2 and err.count("\n") == 1 and "has NaN or infinite values" in err


def resized(folder, **options):
    """An adapter of a model with ten tokens more, and the model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(100, mean_resizing=False)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **options)
    return randomise(get_peft_model(model, config))


KINDS = {
    "linears": dict(target_modules=["q_proj", "v_proj"]),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "saved whole": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resized_vocabulary_is_exported_and_merged(adarank, folders, tmp_path, kind):
    model = resized(folders / "llama", **KINDS[kind])
    inputs = batch("llama")
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][:, 0] = 97  # one of the new tokens
    expected = output(model, inputs)
    assert ada.export_uniform(model, tmp_path / "served") == 8
    again = AutoModelForCausalLM.from_pretrained(folders / "llama")
    again.resize_token_embeddings(100, mean_resizing=False)
    found = output(PeftModel.from_pretrained(again, tmp_path / "served"), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if kind == "head":  # PEFT's own save leaves the embedding out
        return
    model.save_pretrained(tmp_path / "adapter")
    done = adarank("merge", folders / "llama", "adapter", "-o", "merged")
    assert done[0] == 0 and done[2].startswith("wrote merged\nNext: ")
    merged = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(output(merged, inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_resized_model_without_a_checkpoint(tmp_path):
    """Nothing but the inner model's own note says that it was resized."""
    model = tiny("llama")
    model.resize_token_embeddings(100, mean_resizing=False)
    names = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    for made, extra in ((tiny("llama"), set()), (model, names)):
        peft_model = get_peft_model(made, LoraConfig(target_modules=["q_proj"]))
        folder = tmp_path / str(len(extra))
        ada.export_uniform(peft_model, folder)
        found = load_file(folder / "adapter_model.safetensors")
        assert {name for name in found if "lora_" not in name} == extra
