"""Quantised bases: predicted, injected, trained and saved like the model that they stand for."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import adarank_fast as ada
from adarank_fast.adapters import inject as adapters
from adarank_fast.models.quantization import is_packed, keep_unpacked, plain_weight, unpacked
from tests.tiny_models import batch, tiny

KINDS = ["bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8"]
LAYERS = {"Linear4bit", "Linear8bitLt", "Int8Tensor"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """On CPUs with AVX512-BF16 bitsandbytes needs multiples of 64."""
    path = tmp_path_factory.mktemp("base") / "llama"
    tiny("llama", layers=2, width=64).save_pretrained(path)
    return path


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def load(folder, kind):
    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(quant_type=Int8WeightOnlyConfig(version=2))
    elif kind == "bitsandbytes 8-bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    )


def linears(model):
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: module for name, module in found.items() if name != "lm_head"}


def dequantised(folder, model):
    """A plain model with the numbers that the quantised one stands for."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: plain_weight(module).clone() for name, module in linears(model).items()}
    for name, module in linears(plain).items():
        module.weight.data = weights[name].to(torch.float32)
    return plain.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch("llama")).logits


def plan_for(model):
    names = [name.removeprefix("model.") for name in linears(model)]
    sizes = {n: (m.in_features, m.out_features) for n, m in linears(model).items()}
    sizes = {name.removeprefix("model."): size for name, size in sizes.items()}
    return ada.RankPlan({name: (0, 1, 3, 6)[i % 4] for i, name in enumerate(names)}, sizes)


def test_the_layers_are_quantised(folder, kind):
    model = load(folder, kind)
    for module in linears(model).values():
        assert {type(module).__name__, type(module.weight).__name__} & LAYERS
        assert is_packed(module)
        assert plain_weight(module).shape == (module.out_features, module.in_features)
    assert not any(is_packed(module) for module in linears(tiny("llama")).values())


def test_prediction_perturbs_the_numbers_and_writes_nothing(folder, kind):
    model = load(folder, kind)
    with unpacked(model):
        plain = dequantised(folder, model)
        before = {n: plain_weight(m).clone() for n, m in linears(model).items()}
        for name, module in linears(model).items():
            ours, theirs = (ada.perturbation(m, name, 1)[0] for m in (module, linears(plain)[name]))
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    plans = [
        ada.predict_ranks(m, [batch("llama")], 4, target_modules="all-linear", trials=2,
                          progress=False)
        for m in (model, plain)
    ]  # fmt: skip
    with unpacked(model):
        for name, module in linears(model).items():
            assert torch.equal(plain_weight(module), before[name])
    assert set(plans[0].settings["routes"].values()) == {"folded"}
    tolerance = 0.05 if kind == "bitsandbytes 8-bit" else 1e-3  # that also rounds activations
    for name, score in plans[0].scores.items():
        assert score.mean == pytest.approx(plans[1].scores[name].mean, rel=tolerance)


def test_two_steps_have_plain_pefts_gradients(folder, kind, tmp_path):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = load(folder, kind)
        models.append(ada.inject(model, plan_for(model)))
    fused, plain = models
    ada.restore(plain)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in models
    ]
    start = logits(plain)
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model.train()(**batch("llama")).logits[..., ::2].mean().backward()
        theirs = dict(plain.named_parameters())
        trained = [(n, p) for n, p in fused.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * sum(rank > 0 for rank in plan_for_names(fused))
        for name, parameter in trained:
            scale = theirs[name].grad.abs().max()
            torch.testing.assert_close(
                parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5 * float(scale) + 1e-9
            )
        for optimizer in optimizers:
            optimizer.step()
    assert ada.fusion_report(fused).fused_share == 1.0
    expected = logits(fused)
    assert (expected - start).abs().max() > 0.05
    fused.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder, kind), tmp_path)
    keep_unpacked(loaded)  # the packed product rounds to bfloat16
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


def plan_for_names(peft_model):
    config = peft_model.peft_config["default"]
    return [
        config.rank_pattern[key] for key in config.rank_pattern for _ in range(key.count("|") + 1)
    ]


def test_a_failed_injection_leaves_the_base_alone(folder, kind, monkeypatch):
    model = load(folder, kind)
    keep_unpacked(model)
    before = logits(model)

    def fail(*arguments):
        raise ValueError("on purpose")

    monkeypatch.setattr(adapters, "_verify", fail)
    with pytest.raises(ValueError, match="on purpose"):
        ada.inject(model, plan_for(model))
    assert torch.equal(logits(model), before)
    assert not any("lora" in name for name, _ in model.named_modules())
