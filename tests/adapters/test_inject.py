import copy
import random
import warnings
from functools import partial

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from adarank_fast.adapters import inject as adapters
from adarank_fast.adapters.fused_linear import accelerate, restore
from adarank_fast.adapters.inject import inject, keep_unpacked
from adarank_fast.models.targets import find_targets
from adarank_fast.plan.rank_plan import RankPlan
from tests.tiny_models import VOCABULARY, batch, tiny

KINDS = ("bert", "llama", "gpt2", "t5")


def mixed_plan(model, target_modules="all-linear", ranks=(0, 1, 3, 5, 8)):
    """Different ranks next to each other, in a random order; some are 0."""
    rng = random.Random(0)
    targets = find_targets(model, target_modules)
    sizes = {t.name: (t.in_features, t.out_features) for t in targets}
    chosen = {
        name: ranks[i % len(ranks)] for i, name in enumerate(rng.sample([*sizes], len(sizes)))
    }
    return RankPlan(ranks={name: chosen[name] for name in sizes}, sizes=sizes)


def adapters_in(peft_model, adapter="default"):
    """path -> (rows of A, columns of B, scale), read off the layers themselves."""
    return {
        path: (
            layer.lora_A[adapter].weight.shape[0],
            layer.lora_B[adapter].weight.shape[1],
            layer.scaling[adapter],
        )
        for path, layer in peft_model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }


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


def output(model, inputs):
    model.eval()
    with torch.no_grad():
        found = model(**inputs)
    return found.logits if "logits" in found else found.last_hidden_state


def train(peft_model, inputs, steps=3):
    """A few large steps, so that the adapters matter."""
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    peft_model.train()
    for _ in range(steps):
        found = peft_model(**inputs)
        values = found.logits if "logits" in found else found.last_hidden_state
        values[..., ::2].float().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def gradients(peft_model, inputs):
    peft_model.train().zero_grad()
    peft_model(**inputs).logits[..., ::2].mean().backward()
    return {n: p.grad.clone() for n, p in peft_model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_gets_its_rank_and_scale(kind):
    model = tiny(kind)
    plan, inputs = mixed_plan(model), batch(kind)
    paths = {t.name: t.path for t in find_targets(model, "all-linear")}
    before = output(model, inputs)
    peft_model = inject(model, plan)
    assert isinstance(peft_model, PeftModel)
    assert adapters_in(peft_model) == {
        paths[name]: (rank, rank, 2.0) for name, rank in plan.ranks.items() if rank
    }
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert trainable == plan.parameters
    assert torch.equal(output(peft_model, inputs), before)  # B starts at zero


@pytest.mark.parametrize(
    ("scaling", "scale"),
    [(0.7, lambda r: 0.7), ("paper", lambda r: 8 / r), ("rslora", lambda r: 8 / r**0.5)],
)
def test_scalings(scaling, scale):
    model = tiny("bert")
    plan = mixed_plan(model)
    found = adapters_in(inject(model, plan, scaling=scaling))
    for name, rank in plan.ranks.items():
        if rank:
            assert found[name][2] == pytest.approx(scale(rank), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_loads_a_trained_adapter(kind, tmp_path):
    model = tiny(kind)
    inputs = batch(kind)
    fresh, before = copy.deepcopy(model), output(model, inputs)
    peft_model = inject(model, mixed_plan(model))
    train(peft_model, inputs)
    expected = output(peft_model, inputs)
    assert (expected - before).abs().max() > 0.05
    peft_model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # keys that match no module
        loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert adapters_in(loaded) == adapters_in(peft_model)
    exact = output(copy.deepcopy(loaded).double(), inputs)
    error, plains = ((f.double() - exact).abs().max() for f in (expected, output(loaded, inputs)))
    assert error <= 2 * plains + 1e-6
    plain = output(restore(peft_model), inputs)
    torch.testing.assert_close(output(loaded, inputs), plain, rtol=0, atol=1e-6)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), expected, rtol=1e-4, atol=1e-4)


def test_plan_of_the_base_model_fits_the_task_model(tmp_path):
    base = tiny("bert")
    plan = mixed_plan(base, "attention")
    set_seed(0)
    task = BertForSequenceClassification(base.config)
    fresh, inputs = copy.deepcopy(task), batch("bert")
    peft_model = inject(
        task, plan, adapter_name="mixed", task_type="SEQ_CLS", modules_to_save=["classifier"]
    )
    assert adapters_in(peft_model, "mixed") == {
        f"bert.{name}": (rank, rank, 2.0) for name, rank in plan.ranks.items() if rank
    }
    head = sum(p.numel() for p in fresh.classifier.parameters())
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert trainable == plan.parameters + head
    train(peft_model, inputs)
    expected = output(peft_model, inputs)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "mixed")
    torch.testing.assert_close(output(loaded, inputs), expected, rtol=0, atol=1e-6)


def test_plan_of_the_task_model_fits_the_base_model():
    base = tiny("bert")
    task = BertForSequenceClassification(base.config)
    plan = mixed_plan(task, "attention")
    assert adapters_in(inject(base, plan)).keys() == {n for n, r in plan.ranks.items() if r}


class Wrapper(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, **inputs):
        return next(iter(self.children()))(**inputs)


def test_one_prefix_for_all_names():
    plan = mixed_plan(tiny("bert"), "attention")
    wrapper = Wrapper(backbone=tiny("bert"), head=nn.Linear(32, 5))
    found = adapters_in(inject(wrapper, plan))
    assert found.keys() == {f"backbone.{n}" for n, r in plan.ranks.items() if r}
    nested = Wrapper(model=BertForSequenceClassification(tiny("bert").config))
    found = adapters_in(inject(nested, plan))
    assert found.keys() == {f"model.bert.{n}" for n, r in plan.ranks.items() if r}


def test_several_places():
    plan_model = tiny("bert")
    plan = mixed_plan(plan_model, "attention")
    two = Wrapper(left=tiny("bert"), right=tiny("bert"))
    with pytest.raises(ValueError, match=r"fits Wrapper at several paths \(left., right.\)"):
        inject(two, plan)
    # the shapes tell which one is meant
    config = copy.deepcopy(plan_model.config)
    config.hidden_size = 64
    wide = BertModel(config)
    found = adapters_in(inject(Wrapper(left=wide, right=tiny("bert")), plan))
    assert found.keys() == {f"right.{n}" for n, r in plan.ranks.items() if r}


def test_an_exact_name_wins_over_a_suffix():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(25))

    model = Tower()
    model.vision = Tower()
    names = [f"layers.{i}.q" for i in range(25)]  # enough for PEFT to shorten lists of targets
    plan = RankPlan({n: 1 + i % 4 for i, n in enumerate(names)}, dict.fromkeys(names, (8, 8)))
    found = adapters_in(inject(model, plan))
    assert {name: ranks[0] for name, ranks in found.items()} == plan.ranks


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


def test_conv1d_is_set_up_without_warnings():
    model = tiny("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft_model = inject(model, RankPlan.uniform(model, 2))
    assert peft_model.peft_config["default"].fan_in_fan_out is True


def test_four_bit_base(tmp_path):
    import bitsandbytes

    config = LlamaConfig(  # on CPUs with AVX512-BF16 bitsandbytes needs multiples of 64
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    set_seed(0)
    reference = LlamaForCausalLM(config)
    reference.save_pretrained(tmp_path / "base")
    plan = mixed_plan(reference, "all-linear")

    def quantised():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            device_map="cpu",
            dtype=torch.float32,
        )

    inputs = batch("llama")
    model = quantised()
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    peft_model = inject(model, plan)
    assert adapters_in(peft_model) == {
        f"model.{name}": (rank, rank, 2.0) for name, rank in plan.ranks.items() if rank
    }
    with peft_model.disable_adapter():
        before = output(peft_model, inputs)
    assert torch.equal(output(peft_model, inputs), before)
    train(peft_model, inputs)
    expected = output(peft_model, inputs)
    assert (expected - before).abs().max() > 0.05
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantised(), tmp_path / "adapter")
    keep_unpacked(loaded)  # the packed product rounds to bfloat16
    torch.testing.assert_close(output(loaded, inputs), expected, rtol=0, atol=1e-6)

    # also when the model has been used before: prediction runs it in eval mode
    used = quantised()
    output(used, inputs)
    adapted = inject(used, plan, init_lora_weights=False)
    with pytest.MonkeyPatch.context() as patch:
        for module in adapted.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                whole = dequantize_module_weight(module)
                patch.setattr(module, "forward", partial(nn.functional.linear, weight=whole))
        wanted = gradients(adapted, inputs)
    found = gradients(adapted, inputs)
    assert len(found) == 2 * sum(rank > 0 for rank in plan.ranks.values())
    for name, gradient in found.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6)

    other = RankPlan(plan.ranks, {name: (i, o + 8) for name, (i, o) in plan.sizes.items()})
    with pytest.raises(ValueError, match="64 x 64, the plan's .* 64 x 72"):
        inject(quantised(), other)
