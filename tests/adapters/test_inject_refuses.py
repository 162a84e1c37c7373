"""What `inject` and `accelerate` refuse, and that a refused model is as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from adarank_fast.adapters import inject as adapters
from adarank_fast.adapters.accelerate import accelerate, restore
from adarank_fast.adapters.inject import inject
from adarank_fast.plan.rank_plan import RankPlan
from tests.adapters.adapted import adapters_in, mixed_plan
from tests.tiny_models import tiny


def fingerprint(model):
    """Everything about a model that a failed injection must not change."""
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(n, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()],
        sorted(model.__dict__),
    )


def same(one, other):
    return (
        one[0] == other[0]
        and [p[:2] for p in one[1]] == [p[:2] for p in other[1]]
        and all(torch.equal(a[2], b[2]) for a, b in zip(one[1], other[1], strict=True))
        and one[2] == other[2]
    )


def test_plan_of_another_model():
    for model, plan, message in (
        (tiny("llama"), mixed_plan(tiny("bert")), "does not fit LlamaFor.*no linear module enc"),
        (tiny("bert", layers=2), mixed_plan(tiny("bert")), r"\(6 of 18 names missing\)"),
        (tiny("bert"), RankPlan({"qeury": 2}, {"qeury": (32, 32)}), "near matches: .*query"),
        (
            tiny("bert"),
            RankPlan(*[{"encoder.layer.0.attention.self.query": v} for v in (2, (64, 32))]),
            "query is 32 x 32, the plan's .* is 64 x 32",
        ),
        (
            tiny("llama"),
            mixed_plan(tiny("llama", width=64)),
            r"layers.0.self_attn.q_proj is 32 x 32, .* 64 x 64 \(in x out; 21 of 21 differ\)",
        ),
    ):
        before = fingerprint(model)
        with pytest.raises(ValueError, match=message) as raised:
            inject(model, plan)
        assert "\n" not in str(raised.value)
        assert same(fingerprint(model), before)


def test_no_second_injection():
    model = tiny("bert")
    plan = mixed_plan(model, "attention")
    peft_model = inject(model, plan)
    for again in (peft_model, model):
        with pytest.raises(ValueError, match="already has PEFT adapters"):
            inject(again, plan)
    inject(peft_model.unload(), plan)
    with pytest.raises(ValueError, match="wrapped in OptimizedModule; inject first"):
        inject(torch.compile(tiny("bert")), plan)


def test_bad_arguments_leave_the_model_alone():
    model = tiny("gpt2")
    plan = mixed_plan(model, ranks=(1, 2))
    model.transformer.h[0].requires_grad_(False)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="r=4 cannot be given with a plan"):
        inject(model, plan, r=4)
    with pytest.raises(ValueError, match="every rank of the plan is 0"):
        inject(model, RankPlan(dict.fromkeys(plan.ranks, 0), plan.sizes))
    with pytest.raises(ValueError, match="scaling must be"):
        inject(model, plan, scaling="twice")
    with pytest.raises(ValueError, match="got no adapter though planned .*modules_to_save"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject(model, plan, modules_to_save=["c_attn"])
    assert same(fingerprint(model), before)
    assert adapters_in(inject(model, plan))


def test_a_failed_check_undoes_everything(monkeypatch):
    model = tiny("llama").train()
    plan = mixed_plan(model, "attention", ranks=(2, 3))
    before = fingerprint(model)
    whole = adapters.lora_config

    def wrong(patterns, scaling, **kwargs):
        config = whole(patterns, scaling, **kwargs)
        config.rank_pattern[next(iter(config.rank_pattern))] += 1
        return config

    monkeypatch.setattr(adapters, "lora_config", wrong)
    for initialisation in (True, "pissa"):  # PiSSA also swaps the weights of the base model
        with pytest.raises(ValueError, match=r"PEFT gave .*ranks \(3, 3\) .* planned were 2 and"):
            inject(model, plan, init_lora_weights=initialisation)
        assert same(fingerprint(model), before)
    monkeypatch.undo()
    assert adapters_in(inject(model, plan))


def test_projections_that_torch_never_calls():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    for choice in ("attention", ["out_proj"]):
        with pytest.raises(ValueError, match="torch.nn.MultiheadAttention"):
            RankPlan.uniform(model, 2, choice)
    assert {n.rpartition(".")[2] for n in RankPlan.uniform(model, 2, "all-linear").ranks} == {
        "linear1",
        "linear2",
    }
    with pytest.raises(ValueError, match="no linear module layers.0.self_attn.out_proj"):
        inject(model, RankPlan(*[{"layers.0.self_attn.out_proj": v} for v in (2, (32, 32))]))


def test_torchs_fast_path_passes_by_adapters():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    plan = RankPlan.uniform(model, 2, "all-linear")
    with pytest.warns(UserWarning, match=r"set_fastpath_enabled\(False\)"):
        inject(model, plan)


def test_the_wrong_order():
    from torch.distributed.tensor import DTensor, init_device_mesh

    plan = mixed_plan(tiny("bert"), "attention")
    model = inject(tiny("bert"), plan)
    restore(model)
    with pytest.raises(ValueError, match="OptimizedModule is compiled already; accelerate first"):
        accelerate(torch.compile(model))
    model.base_model.model.encoder.layer[1].compile()
    with pytest.raises(ValueError, match="layer.1 is compiled already; accelerate first"):
        accelerate(model)
    sharded = tiny("bert")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in sharded.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                shard = DTensor.from_local(parameter.detach(), mesh)
                setattr(module, name, nn.Parameter(shard, requires_grad=False))
        with pytest.raises(ValueError, match="is sharded .*inject first, then fully_shard"):
            inject(sharded, plan)
    finally:
        torch.distributed.destroy_process_group()
