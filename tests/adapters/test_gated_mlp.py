"""Gated MLPs that keep less for backward: the same bits as without, and when they stand back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

import adarank_fast as ada
from adarank_fast.adapters.gated_mlp import gated_mlps

SIZES: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=60,
)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(head_dim=8, **SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=8, **SIZES)),
}
IDS = torch.arange(24).reshape(2, 12)


def adapted(kind: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    set_seed(0)
    options = dict(r=4, target_modules="all-linear", init_lora_weights=False) | config
    model = MODELS[kind]().to(dtype)
    return ada.accelerate(peft.get_peft_model(model, peft.LoraConfig(**options)))


def step(model: Any, seed: int = 0) -> list[Tensor]:
    """Loss and all gradients."""
    model.zero_grad()
    set_seed(seed)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def recomputing(model: Any) -> Any:
    ada.accelerate(model, recompute_mlp=True)
    assert ada.fusion_report(model).recomputed_mlps == 2
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", MODELS)
def test_same_bits(kind: str, dropout: float, dtype: torch.dtype) -> None:
    model = adapted(kind, dtype, lora_dropout=dropout).train()
    for _ in range(3):
        expected = step(model)
    state = torch.get_rng_state()
    recomputing(model)
    assert torch.equal(state, torch.get_rng_state()) or dropout == 0  # nothing was drawn
    assert all(module.training for module in model.modules())
    assert equal(step(model), expected)


@pytest.mark.parametrize("ranks", [{"gate_proj": 0}, {"down_proj": 8, "up_proj": 1}])
def test_mixed_ranks(ranks: dict[str, int]) -> None:
    set_seed(0)
    model = MODELS["llama"]()
    targets = [name for name, m in model.named_modules() if name.endswith("_proj")]
    config = peft.LoraConfig(
        r=3,
        target_modules=[t for t in targets if ranks.get(t.rpartition(".")[2]) != 0],
        rank_pattern={k: r for k, r in ranks.items() if r},
        init_lora_weights=False,
    )
    model = ada.accelerate(peft.get_peft_model(model, config)).train()
    for _ in range(2):
        expected = step(model)
    assert equal(step(recomputing(model)), expected)


def kept_bytes(layer: nn.Module, width: int, head: int, tokens: int = 256) -> int:
    """What a forward leaves behind."""
    x = torch.randn(1, tokens, width, requires_grad=True)
    cos, sin = torch.ones(1, tokens, head), torch.zeros(1, tokens, head)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        output = layer(x, position_embeddings=(cos, sin))
    del output
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


def test_a_layer_of_llama_8b_in_small_keeps_30_percent_less() -> None:
    # Llama-3-8B: hidden 4,096, intermediate 14,336, 32 heads, 8 of them for keys and values
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=896,
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=10,
        )
    )
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).train()
    ada.accelerate(model, example={"input_ids": IDS % 10})
    layer = model.get_submodule("base_model.model.model.layers.0")
    before = kept_bytes(layer, 256, 32)
    ada.accelerate(model, recompute_mlp=True)
    after = kept_bytes(layer, 256, 32)
    assert after < 0.7 * before
    assert before - after >= 2 * 256 * 896 * 4  # act(gate) and the product


def test_restore_and_copies() -> None:
    model = recomputing(adapted())
    plain = pickle.loads(pickle.dumps(model))
    assert not list(gated_mlps(plain))
    copied = copy.deepcopy(model)
    assert equal(step(copied), step(model))
    for module in gated_mlps(copied):
        held = module._adarank_mlp.activation_module
        assert held is module.act_fn
    mlp = next(gated_mlps(model))
    assert repr(mlp).startswith("LlamaMLP(")
    ada.restore(model)
    assert not list(gated_mlps(model)) and type(mlp).__name__ == "LlamaMLP"
    assert "_adarank_mlp" not in mlp.__dict__


def count_recomputations(model: Any, monkeypatch: pytest.MonkeyPatch, run: Any = step) -> int:
    from adarank_fast.adapters import gated_mlp

    calls = []
    compute = gated_mlp._compute
    monkeypatch.setattr(gated_mlp, "_compute", lambda *a: calls.append(1) or compute(*a))
    run(model)
    return len(calls)


def mlps(model: Any) -> list[Any]:
    return [m for path, m in model.named_modules() if path.endswith(".mlp")]


def hook_the_activation(model: Any) -> None:
    for module in mlps(model):
        module.act_fn.register_forward_hook(lambda *_: None)


def another_activation(model: Any) -> None:
    for module in mlps(model):
        module.act_fn = nn.Tanh()


def another_forward(model: Any) -> None:
    for module in mlps(model):
        module.forward = lambda x, own=module: own.down_proj(own.up_proj(x))


def checkpointing(reentrant: bool) -> Any:
    def switch(model: Any) -> None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    return switch


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (lambda model: None, 2),
        (hook_the_activation, 0),
        (another_activation, 0),
        (another_forward, 0),
        (checkpointing(False), 0),
        (checkpointing(True), 2),  # while it repeats the forward
    ],
    ids=["none", "hook", "activation", "forward", "checkpoint", "reentrant"],
)
def test_when_it_stands_back(change: Any, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = recomputing(adapted()).train(), adapted().train()
    change(model)
    change(expected)
    assert all(
        torch.allclose(a, b, 1e-5, 1e-6) for a, b in zip(step(model), step(expected), strict=True)
    )
    assert count_recomputations(model, monkeypatch) == calls


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: Any) -> None:
        with torch.no_grad():
            model(input_ids=IDS)

    assert count_recomputations(recomputing(adapted()), monkeypatch, run) == 0


@pytest.mark.parametrize("of", ["gate", "lora_B"])
def test_a_change_in_place_before_the_backward_pass_is_refused(of: str) -> None:
    model = recomputing(adapted()).train()
    step(model)
    mlp = next(gated_mlps(model))
    kept = []
    mlp.gate_proj.register_forward_hook(lambda m, x, y: kept.append(y))
    loss = model(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        (kept[0] if of == "gate" else mlp.down_proj.lora_B["default"].weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_twice_through_one_graph() -> None:
    model = recomputing(adapted()).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    wanted = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert equal(list(first), list(torch.autograd.grad(loss, wanted)))


class Gated(nn.Module):
    """Variants of a gated MLP; the first is one."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        if variant == "dropout":
            self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        if self.variant == "clamped":
            gate = gate.clamp(max=7)
        act = F.relu(gate) if self.variant == "relu" else F.gelu(gate, approximate="tanh")
        if self.variant == "functional dropout":
            act = F.dropout(act, 0.5, self.training)
        if self.variant == "dropout":
            act = self.drop(act)
        if self.variant == "same factor twice":
            up = act
        out = self.down(act * up)
        return out + 1 if self.variant == "added" else out


@pytest.mark.parametrize(
    ("variant", "found"),
    [
        ("plain", 1),
        *[(v, 0) for v in ("clamped", "relu", "functional dropout", "dropout", "added")],
        ("same factor twice", 0),
    ],
)
def test_only_exactly_this_structure(variant: str, found: int) -> None:
    set_seed(0)
    model = nn.Sequential(Gated(variant)).eval()
    config = peft.LoraConfig(r=2, target_modules=["gate", "up", "down"], init_lora_weights=False)
    model = ada.accelerate(peft.get_peft_model(model, config).eval())
    x = torch.randn(3, 8, requires_grad=True)
    for _ in range(2):  # gate and up become a group
        expected = torch.autograd.grad(model(x).sum(), x)
    if found:
        ada.accelerate(model, recompute_mlp=True)
    else:
        with pytest.warns(UserWarning, match="has no MLP of the form"):
            ada.accelerate(model, recompute_mlp=True)
    assert len(list(gated_mlps(model))) == found
    assert not any(module.training for module in model.modules())
    assert equal(list(expected), list(torch.autograd.grad(model(x).sum(), x)))


@pytest.mark.parametrize(
    "model",
    [
        lambda: T5ForConditionalGeneration(
            T5Config(
                d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=60,
                feed_forward_proj="gated-gelu",
            )
        ),
        lambda: Phi3ForCausalLM(Phi3Config(pad_token_id=0, **SIZES)),
    ],
    ids=["t5 drops between", "phi3 has one product for both"],
)  # fmt: skip
def test_architectures_with_another_structure(model: Any) -> None:
    adapted_model = peft.get_peft_model(model(), peft.LoraConfig(target_modules="all-linear"))
    with pytest.warns(UserWarning, match="has no MLP of the form"):
        ada.accelerate(adapted_model, recompute_mlp=True)


def test_compiled_blocks_are_left_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = recomputing(adapted()).train()
    expected = step(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp")
    layer.compile(backend="aot_eager")
    assert all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(step(model), expected, strict=True))


def test_what_something_else_made_of_a_gated_mlp_is_not_restored() -> None:
    """`fully_shard` gives a module a class of its own."""
    model = recomputing(adapted())
    mlp = next(gated_mlps(model))
    made = type("Sharded", (type("Base", (), {}), type(mlp)), {})
    mlp.__class__ = made
    with pytest.raises(ada.AdarankError, match="became a Sharded after accelerate"):
        ada.restore(model)
    assert type(mlp) is made and "FusedLinear" in type(mlp.up_proj).__name__
    assert mlp._get_name() == "Sharded"


def test_no_hooks_are_left_when_it_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model, register, calls = adapted(), nn.Module.register_forward_hook, []

    def interrupted(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        calls.append(register(self, *arguments, **options))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(nn.Module, "register_forward_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ada.accelerate(model, recompute_mlp=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(gated_mlps(model))
