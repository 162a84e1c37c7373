"""Adapters of experts in 3-D parameters: PEFT's own, of the planned ranks, beside fused layers."""

import copy
import warnings

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import adarank_fast as ada
from adarank_fast.models.precision import copy_in_dtype
from tests.tiny_models import batch, spread, tiny

BATCH = {"input_ids": batch("mixtral")["input_ids"]}
PLAIN = dict(
    vocab_size=90,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
)
ONE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
ROUTED |= dict(n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1)
ARCHITECTURES = {  # and how many experts are active for a token
    "qwen3_moe": (ONE, 2),
    "qwen2_moe": (ONE | dict(shared_expert_intermediate_size=20), 2),
    "olmoe": (dict(num_experts=4, num_experts_per_tok=2), 2),
    "deepseek_v3": (ROUTED | LATENT | dict(num_key_value_heads=4), 2),
    "glm4_moe": (ROUTED, 2),
    "gpt_oss": (LOCAL | dict(num_experts_per_tok=3), 3),
    "phimoe": (LOCAL, 2),
    "granitemoe": (LOCAL, 2),
    "llama4_text": (LOCAL | dict(num_experts_per_tok=1, interleave_moe_layer_step=1), 1),
    "gemma4_text": (
        dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=12)
        | dict(hidden_size_per_layer_input=0, num_kv_shared_layers=0),
        2,
    ),
    "jetmoe": (LOCAL | dict(kv_channels=4, num_key_value_heads=4), 2),
}


def gradients(model):
    model.zero_grad()
    out = model(**BATCH).logits
    out.square().mean().backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def with_mixed_ranks(plan, ranks=(3, 0, 5, 1, 2)):
    mixed = {name: ranks[index % len(ranks)] for index, name in enumerate(plan.ranks)}
    return ada.RankPlan(mixed, plan.sizes, settings=plan.settings)


def test_mixtral_in_float64_is_plain_peft():
    base = copy_in_dtype(tiny("mixtral", layers=2), torch.float64)  # with experts that take it
    plan = with_mixed_ranks(ada.RankPlan.uniform(base, 2))
    ours = ada.inject(copy.deepcopy(base), plan, example=BATCH)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    theirs = get_peft_model(copy.deepcopy(base), plan.to_lora_config())
    theirs.load_state_dict(ours.state_dict())
    (found, mine), (expected, reference) = gradients(ours), gradients(theirs)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert (found - base(**BATCH).logits).abs().max() > 1e-3
    assert mine.keys() == reference.keys()
    assert sum("experts" in name for name in mine) == 2 * sum(
        rank > 0 for name, rank in plan.ranks.items() if name in plan.experts
    )
    for name, gradient in mine.items():
        assert torch.allclose(gradient, reference[name], rtol=1e-9, atol=1e-14), name
    report = str(ada.fusion_report(ours))
    assert (
        "layers left to PEFT: parameters of experts, for which PEFT's lora.ParamWrapper" in report
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures(kind):
    options, active = ARCHITECTURES[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**PLAIN, **options})
    base = spread(AutoModelForCausalLM.from_config(config).eval())
    plan = ada.RankPlan.uniform(base, 3, expert_rank="divided")
    assert {tuple(each) for each in plan.experts.values()} == {(4, active)}
    assert {plan.ranks[name] for name in plan.experts} == {max(1, 3 // active)}
    mixed = with_mixed_ranks(plan)
    model = ada.inject(base, mixed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == mixed.parameters


def test_probes_of_experts_cost_a_forward_each_however_many_there_are():
    from transformers import MixtralConfig, MixtralForCausalLM

    calls = {}
    for count in (4, 32):
        config = MixtralConfig(**PLAIN, num_local_experts=count, num_experts_per_tok=2)
        model = spread(MixtralForCausalLM(config))
        seen = []
        handle = model.model.layers[1].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        ada.predict_ranks(model, [BATCH], 2, trials=2, output="logits", progress=False)
        handle.remove()
        calls[count] = len(seen)
    assert calls[4] == calls[32]


@pytest.mark.parametrize(
    "argument",
    [
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
    ],
)
def test_what_peft_has_not_for_parameters_is_refused(argument):
    model = tiny("mixtral", layers=1)
    plan = ada.RankPlan.uniform(model, 2)
    name, value = next(iter(argument.items()))
    with pytest.raises(ada.AdarankError, match=f"{name}={value!r}: PEFT has it for layers, not"):
        plan.to_lora_config(**argument)
    with pytest.raises(ada.AdarankError, match="leave experts out"):
        ada.inject(model, plan, **argument)
    attention = ada.RankPlan.uniform(model, 2, "attention")
    if "init_lora_weights" not in argument:
        ada.inject(model, attention, **argument)


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.19"), reason="this PEFT takes them for modules"
)
def test_modules_that_peft_takes_for_experts_are_refused():
    options, _ = ARCHITECTURES["glm4_moe"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **PLAIN, **options))
    names = set(model.state_dict())
    for targets in ("all-linear", ["up_proj"]):
        plan = ada.RankPlan.uniform(model, 2, targets)
        with pytest.raises(ada.AdarankError, match="takes every gate_proj, up_proj, .* Glm4Moe"):
            ada.inject(model, plan)
        assert set(model.state_dict()) == names


def test_experts_alone_are_saved_loaded_and_merged(tmp_path):
    base = tiny("mixtral", layers=2)
    plan = with_mixed_ranks(ada.RankPlan.uniform(base, 2, "experts"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = ada.inject(copy.deepcopy(base), plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    assert str(ada.fusion_report(model)).startswith("0 of 3 LoRA layers fused")
    expected = model(**BATCH).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(ada.accelerate(loaded)(**BATCH).logits, expected)
    merged = model.merge_and_unload()(**BATCH).logits
    assert torch.allclose(merged, expected, atol=1e-5)
