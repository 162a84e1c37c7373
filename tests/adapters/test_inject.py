"""What `inject` makes of a model: ranks, scales, names, trained adapters that plain PEFT loads."""

import copy
import warnings
from functools import partial

import pytest
import torch
from peft import PeftModel
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

from adarank_fast.adapters.accelerate import restore
from adarank_fast.adapters.inject import inject, keep_unpacked
from adarank_fast.models.targets import find_targets
from adarank_fast.plan.rank_plan import RankPlan
from tests.adapters.adapted import adapters_in, mixed_plan, output
from tests.tiny_models import VOCABULARY, batch, tiny

KINDS = ("bert", "llama", "gpt2", "t5")


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


def test_several_prefixes():
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
