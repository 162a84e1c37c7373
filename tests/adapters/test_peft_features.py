"""PEFT's features with mixed ranks: fused layers do what PEFT does, or fall back and say so."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, BertForSequenceClassification, set_seed

import adarank_fast as ada
from adarank_fast.cli import main as cli
from adarank_fast.models.targets import find_targets
from adarank_fast.plan.rank_plan import RankPlan
from tests.tiny_models import batch, tiny


def plan_of(model, target_modules="all-linear", ranks=(3, 0, 1, 5)):
    sizes = {t.name: (t.in_features, t.out_features) for t in find_targets(model, target_modules)}
    chosen = {name: ranks[(i + i // 7) % len(ranks)] for i, name in enumerate(sizes)}
    return RankPlan(chosen, sizes, settings={"base_model_prefix": "model."})


def randomise(peft_model, seed=0):
    """As if trained, every adapter; the same numbers each time."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


def pair(**kwargs):
    """(plain PEFT, fused): the same weights."""
    model = tiny("llama", layers=2)
    fused = ada.inject(model, plan_of(model), example=batch("llama"), **kwargs)
    randomise(fused)
    plain = ada.restore(copy.deepcopy(fused))
    return plain, fused


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(**(inputs or batch("llama"))).logits


def gradients(model):
    model.train().zero_grad()
    model(**batch("llama")).logits[..., ::2].mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(plain, fused):
    wanted, found = gradients(plain), gradients(fused)
    assert found.keys() == wanted.keys() and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)


def ranks_in(peft_model, adapter="default"):
    return {
        path: layer.r[adapter]
        for path, layer in peft_model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.r
    }


def test_several_adapters_and_switching(tmp_path):
    plain, fused = pair()
    second = plan_of(tiny("llama", layers=2), ["q_proj", "k_proj", "v_proj"], ranks=(2, 4, 7))
    for model in (plain, fused):
        model.add_adapter("other", second.to_lora_config("paper"))
        randomise(model, seed=1)
    ada.accelerate(fused)  # the layers that only the second adapter has
    seen = []
    for name in ("default", "other", "default"):
        for model in (plain, fused):
            model.set_adapter(name)
        assert_same_gradients(plain, fused)
        torch.testing.assert_close(logits(fused), logits(plain), rtol=1e-5, atol=1e-6)
        seen.append(logits(fused))
    assert torch.equal(seen[0], seen[2]) and (seen[0] - seen[1]).abs().max() > 0.01
    reasons = set().union(*(layer.reasons for layer in ada.fusion_report(fused).values()))
    assert reasons == set()
    fused.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", layers=2), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name, expected in zip(("default", "other"), seen, strict=False):
        loaded.set_adapter(name)
        assert ranks_in(loaded, name) == ranks_in(fused, name)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
    fused.delete_adapter("other")
    fused.set_adapter("default")
    torch.testing.assert_close(logits(fused), seen[0])


def test_disable_adapter():
    plain, fused = pair()
    base = logits(tiny("llama", layers=2))
    adapted = logits(fused)
    with fused.disable_adapter():
        torch.testing.assert_close(logits(fused), base, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits(fused), adapted)
    assert_same_gradients(plain, fused)


def test_modules_to_save(tmp_path):
    set_seed(0)
    base = BertForSequenceClassification(tiny("bert").config)
    fresh = copy.deepcopy(base)
    fused = ada.inject(base, plan_of(base, "attention"), task_type="SEQ_CLS")
    randomise(fused)
    plain = ada.restore(copy.deepcopy(fused))
    inputs = batch("bert")
    for model in (plain, fused):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            model.train()
            set_seed(1)  # dropout of the base model
            model(**inputs, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
            optimizer.step()
    trained = {n: p for n, p in fused.named_parameters() if p.requires_grad}
    assert any("classifier.modules_to_save" in name for name in trained)
    for name, parameter in trained.items():
        theirs = plain.get_parameter(name)
        torch.testing.assert_close(parameter, theirs, rtol=1e-4, atol=1e-6)
    assert (fused.base_model.model.classifier.weight - fresh.classifier.weight).abs().max() > 0.01
    fused.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    expected = logits(fused, **inputs)
    torch.testing.assert_close(logits(loaded, **inputs), expected, rtol=1e-5, atol=1e-6)


def test_tied_weights(tmp_path, monkeypatch):
    """An adapter on a head that shares the embedding's weight; merging parts the two."""
    model = tiny("gpt2", layers=2)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.config.architectures = ["GPT2LMHeadModel"]
    model.save_pretrained(tmp_path / "base")
    names = ["lm_head", "h.0.attn.c_attn"]
    plan = RankPlan(dict(zip(names, (4, 2), strict=True)), {
        "lm_head": (32, model.config.vocab_size), "h.0.attn.c_attn": (32, 96)
    })  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about merging tied weights
        fused = ada.inject(model, plan, task_type="CAUSAL_LM")
    randomise(fused)
    inputs = batch("gpt2")
    plain = ada.restore(copy.deepcopy(fused))
    expected = logits(plain, **inputs)
    torch.testing.assert_close(logits(fused, **inputs), expected, rtol=1e-5, atol=1e-6)
    fused.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.main(["merge", "base", "adapter", "-o", "merged"])
    assert done.value.code == 0
    merged = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(merged, **inputs), expected, rtol=1e-4, atol=1e-4)
    assert merged.lm_head.weight is not merged.transformer.wte.weight
    assert torch.equal(merged.transformer.wte.weight, tiny("gpt2", layers=2).transformer.wte.weight)


def test_tied_weights_stay_tied_where_the_adapter_leaves_them(tmp_path, monkeypatch):
    model = tiny("gpt2", layers=2)
    model.config.architectures = ["GPT2LMHeadModel"]
    model.save_pretrained(tmp_path / "base")
    ada.inject(model, RankPlan.uniform(model, 2)).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["merge", "base", "adapter", "-o", "merged"])
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert merged.lm_head.weight is merged.transformer.wte.weight


def test_a_tied_head_of_an_encoder_decoder_is_not_merged(tmp_path, monkeypatch, capfd):
    model = tiny("t5", layers=2)
    model.config.architectures = ["T5ForConditionalGeneration"]
    model.save_pretrained(tmp_path / "base")
    plan = RankPlan({"lm_head": 4}, {"lm_head": (32, model.config.vocab_size)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = ada.inject(model, plan, task_type="SEQ_2_SEQ_LM")
    randomise(fused)
    fused.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.main(["merge", "base", "adapter", "-o", "merged"])
    assert done.value.code == 2
    assert "the adapter changes the head or the embedding, which share" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    "arguments",
    [
        dict(scaling="rslora"),
        dict(lora_dropout=0.0, init_lora_weights="gaussian"),
        dict(use_dora=True),
        dict(lora_bias=True),
    ],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_variants(arguments, tmp_path):
    plain, fused = pair(**arguments)
    assert_same_gradients(plain, fused)
    expected = logits(fused)
    torch.testing.assert_close(expected, logits(plain), rtol=1e-5, atol=1e-6)
    assert ada.fusion_report(fused).fused_share == 1.0
    fused.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", layers=2), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("combination", ["svd", "cat", "linear", "ties"])
def test_add_weighted_adapter(combination, tmp_path):
    """PEFT cannot load what it saves of "linear" and its kin with mixed ranks (its issue 3737,
    open); `export_uniform` writes a folder that it can."""
    plain, fused = pair()
    second = plan_of(tiny("llama", layers=2), ranks=(3, 0, 1, 5))
    for model in (plain, fused):
        model.add_adapter("other", second.to_lora_config())
        randomise(model, seed=2)
        density = dict(density=0.5) if combination == "ties" else {}
        model.add_weighted_adapter(
            ["default", "other"], [0.7, 0.4], "both", combination_type=combination, **density
        )
        model.set_adapter("both")
    expected = logits(plain)
    torch.testing.assert_close(logits(fused), expected, rtol=1e-4, atol=1e-5)
    ada.export_uniform(fused, tmp_path / "uniform", adapter_name="both")
    loaded = PeftModel.from_pretrained(tiny("llama", layers=2), tmp_path / "uniform")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    if combination in ("svd", "cat"):
        for parameter in fused.parameters():  # PEFT 0.18 cannot save what its svd leaves strided
            parameter.data = parameter.data.contiguous()
        fused.save_pretrained(tmp_path, selected_adapters=["both"])
        loaded = PeftModel.from_pretrained(tiny("llama", layers=2), tmp_path / "both")
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


class Nasty(nn.Module):
    """Names that are suffixes, prefixes and patterns of one another."""

    NAMES = [
        "q",
        "x.q",
        "layers.1.q",
        "layers.11.q",
        "layers.1.q_proj",
        "layers.1.x.q",
        "layers.1x",
    ]

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            owner = self
            *parents, last = name.split(".")
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner._modules[parent]
            owner.add_module(last, nn.Linear(8, 8))

    def forward(self, x):
        for name in self.NAMES:
            x = x + self.get_submodule(name)(x)
        return x


def test_saving_sorts_the_keys_and_nothing_changes(tmp_path):
    """PEFT takes the first key that matches, and its file has them in another order."""
    ranks = {name: 7 - place for place, name in enumerate(Nasty.NAMES)}
    plan = RankPlan(ranks, dict.fromkeys(ranks, (8, 8)))
    torch.manual_seed(0)
    base = Nasty()
    for make in (
        lambda m: ada.inject(m, plan, scaling="paper"),
        lambda m: get_peft_model(m, plan.to_lora_config("paper")),
    ):
        peft_model = make(copy.deepcopy(base))
        randomise(peft_model)
        assert ranks_in(peft_model) == ranks
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        peft_model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert ranks_in(loaded) == ranks
        x = torch.randn(5, 8)
        torch.testing.assert_close(loaded(x), peft_model(x))


def test_many_modules_need_few_keys(tmp_path):
    """Python keeps 512 compiled patterns, and PEFT tries each key on each module."""
    base = nn.ModuleDict({f"layer{i}": nn.Linear(2, 2) for i in range(600)})
    names = {f"layer{i}": 1 + i % 9 for i in range(600)}
    plan = RankPlan(names, dict.fromkeys(names, (2, 2)))
    config = plan.to_lora_config()
    assert len(config.rank_pattern) == len(config.alpha_pattern) == 9
    peft_model = get_peft_model(copy.deepcopy(base), config)
    assert ranks_in(peft_model) == names
    peft_model.save_pretrained(tmp_path)
    assert ranks_in(PeftModel.from_pretrained(base, tmp_path)) == names
    for name, rank in names.items():  # the rule that vLLM has copied from PEFT
        found = [r for key, r in config.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", name)]
        assert found == [rank]
