"""Several active adapters, none in some layers, `lora_bias` and variants: fused, as PEFT has them.

float64 PEFT is the truth; the error of fused layers is at most twice that of PEFT in their dtype.
"""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import dora
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

try:
    from peft.tuners.lora import BdLoraConfig
except ImportError:
    BdLoraConfig = None

import adarank_fast as ada
from tests.adapters.fused_models import fusable, reasons

RANKS = {"q": 1, "k": 3, "v": 8}
OTHER_RANKS = {"q": 24, "v": 64}  # none in k
KINDS = ["lora_bias", "several", "several, lora_bias", "absent", "dora"]
if BdLoraConfig is not None:  # this PEFT has them
    KINDS += ["blocks in A", "blocks in B", "one block in B", "several, blocks in B", "mica"]
EVEN = {"q": 2, "k": 4, "v": 8}  # where there are two blocks
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


class Bent(nn.Linear):
    """A base layer with a product of its own."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


class Branches(nn.Module):
    """q, k and v read one tensor; k has no bias."""

    def __init__(self, linear=nn.Linear, width=40):
        super().__init__()
        torch.manual_seed(0)
        if linear is Conv1D:
            self.q, self.k, self.v = (Conv1D(width, width) for _ in range(3))
            nn.init.normal_(self.q.bias)
        else:
            self.q, self.k = linear(width, width), linear(width, width, bias=False)
            self.v = linear(width, width)

    def forward(self, x):
        return torch.sin(self.q(x)) + self.k(x) * self.v(x)


def model_of(kind, dtype=torch.float32, adapter_dtype=None, linear=nn.Linear, dropout=0.0):
    """Plain PEFT, as if trained."""
    torch.manual_seed(1)
    options = dict(
        lora_alpha=5,
        lora_dropout=dropout,
        lora_bias="lora_bias" in kind,
        use_dora=kind == "dora",
        fan_in_fan_out=linear is Conv1D,
    )
    ranks, other_ranks = RANKS, OTHER_RANKS
    if "block" in kind:
        ranks, other_ranks = EVEN, {"q": 24, "v": 64}
        where = {f"target_modules_bd_{kind[-1].lower()}": list(ranks)}
        options["use_bdlora"] = BdLoraConfig(nblocks=2 if "blocks" in kind else 1, **where)
    if kind == "mica":
        options["init_lora_weights"] = "mica"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a bias where the base has none
        model = get_peft_model(
            Branches(linear), LoraConfig(target_modules=list(ranks), rank_pattern=ranks, **options)
        )
        if "several" in kind or kind == "absent":
            options["lora_alpha"] = 11
            other = LoraConfig(
                target_modules=list(other_ranks), rank_pattern=other_ranks, **options
            )
            model.add_adapter("other", other)
            active = ["default", "other"] if "several" in kind else ["other"]
            model.base_model.set_adapter(active)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "magnitude" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        parameter.data = parameter.data.to(adapter_dtype if "lora_" in name else dtype)
    return model.train()


def results(model, x, call=None):
    """The output, then gradients of x and of every parameter that has one."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    output = (model if call is None else call)(x)
    slope = torch.linspace(-1, 1, output.shape[-1], dtype=torch.float64)
    (output * slope.to(output.dtype)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **found}


def error_of(found, truth):
    assert found.keys() == truth.keys()
    return {
        name: ((found[name].double() - value).norm() / value.norm()).item()
        for name, value in truth.items()
    }


def as_good(found, plain, truth, dtype):
    """At most twice PEFT's error, and that of one more rounding of a small result."""
    floor = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]
    ours, theirs = error_of(found, truth), error_of(plain, truth)
    for name, error in ours.items():
        assert found[name].dtype == plain[name].dtype
        assert error <= 2 * theirs[name] + floor, (name, error, theirs[name])


def group_sizes(model):
    return {len(layer.group) for layer in ada.fusion_report(model).values()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, adapter_dtype", DTYPES)
@pytest.mark.parametrize("linear", [nn.Linear, Conv1D, Bent])
def test_outputs_and_gradients(kind, dtype, adapter_dtype, linear):
    if "block" in kind and linear is not nn.Linear:
        pytest.skip("PEFT makes no blocks for Conv1D, and writes into what the base layer saved")
    plain = model_of(kind, dtype, adapter_dtype, linear)
    fused = ada.accelerate(copy.deepcopy(plain))
    x = torch.randn(3, 7, 40, dtype=dtype)
    truth = results(copy.deepcopy(plain).double(), x.double())
    wanted = results(plain.to(dtype), x)  # float32 adapters are cast, not the activations
    found = [results(fused, x) for _ in range(3)]
    for each in found:
        in_dtype = {name: value.to(dtype) for name, value in each.items()}
        as_good(in_dtype, wanted, truth, dtype)
        assert all(value.dtype == adapter_dtype for n, value in each.items() if "lora_" in n)
    for name, value in found[1].items():
        assert torch.equal(value, found[2][name]), f"{name} differs when repeated"
    if kind == "dora" and linear is Bent:
        assert reasons(fused) == {"DoRA on a base layer with a product of its own"}
    elif kind == "blocks in A":
        assert reasons(fused) == {"BD-LoRA with blocks in A"}
    else:
        assert ada.fusion_report(fused).fused_share == 1.0 and group_sizes(fused) == {3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "compiled", "autocast", "aten"])
def test_ways_to_run(kind, how, monkeypatch):
    if how == "aten":
        monkeypatch.setattr("adarank_kernels.lora.backends.cpu._usable", {torch.float32: False})
    plain = model_of(kind, torch.float32, torch.float32)
    fused = ada.accelerate(copy.deepcopy(plain))
    x = torch.randn(9, 40)
    calls = {model: model for model in (plain, fused)}
    if how.endswith("reentrant"):
        for model in calls:
            calls[model] = lambda x, m=model: checkpoint(m, x, use_reentrant=how == "reentrant")
    elif how == "compiled":
        fused(x), fused(x)
        torch._dynamo.reset()
        calls[fused] = torch.compile(fused, fullgraph=True, backend="aot_eager")
    elif how == "autocast":
        for model in calls:
            calls[model] = torch.autocast("cpu", torch.bfloat16)(model.forward)
    truth = results(copy.deepcopy(plain).double(), x.double())
    wanted = results(plain, x, calls[plain])
    for _ in range(3):
        as_good(results(fused, x, calls[fused]), wanted, truth, torch.float32)
    assert reasons(fused) == ({"BD-LoRA with blocks in A"} if kind == "blocks in A" else set())


def several_drop(model):
    for layer in fusable_in(model):
        for drop in layer.lora_dropout.values():
            drop.p = 0.5


def fusable_in(model):
    inner = model.base_model.model
    return [inner.q, inner.k, inner.v]


def other_data(model):
    for layer in fusable_in(model):
        for name in layer.lora_A:
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            if type(layer.lora_A[name]) is type(layer.lora_B[name]):  # no blocks, of fixed shapes
                A.data, B.data = A.data[:1], B.data[:, :1]
            A.data = A.data * 2


def other_scale(model):
    for layer in fusable_in(model):
        layer.set_scale("default", 3.0)


def tensor_scale(model):
    for layer in fusable_in(model):
        layer.scaling["default"] = torch.tensor(1.5)


def other_active(model):
    model.base_model.set_adapter(["other", "default"] if "other" in model.peft_config else [])


def hooked(model):
    layer = fusable_in(model)[2]
    layer.lora_B[layer.active_adapters[0]].register_forward_hook(lambda m, args, out: 2 * out)


def in_place(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)


def replaced(model):
    for layer in fusable_in(model):
        for vectors in (layer.lora_B, getattr(layer, "lora_magnitude_vector", {})):
            for module in vectors.values():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter.detach() * 0.5))


CHANGES = [other_data, other_scale, tensor_scale, other_active, hooked, in_place, replaced]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_goes_stale(kind, change):
    plain = model_of(kind, torch.float32, torch.float32)
    fused = ada.accelerate(copy.deepcopy(plain))
    x = torch.randn(9, 40)
    results(fused, x), results(fused, x)
    for model in (plain, fused):
        change(model)
    truth = results(copy.deepcopy(plain).double(), x.double())
    wanted = results(plain, x)
    for _ in range(2):
        as_good(results(fused, x), wanted, truth, torch.float32)


def test_an_adapter_that_comes_later():
    """A layer without the active adapter gets it."""
    plain = model_of("absent", torch.float32, torch.float32)
    fused = ada.accelerate(copy.deepcopy(plain))
    x = torch.randn(9, 40)
    results(fused, x), results(fused, x)
    takes = inspect.signature(plain.base_model.model.k.update_layer).parameters
    rest = dict(lora_dropout=0.0, init_lora_weights=True, use_rslora=False)  # PEFT 0.18 asks
    for model in (plain, fused):
        torch.manual_seed(4)
        options = {name: value for name, value in rest.items() if name in takes}
        options |= {"config": model.peft_config["other"]} if "config" in takes else {}
        model.base_model.model.k.update_layer("other", 4, lora_alpha=8, **options)
        nn.init.ones_(model.base_model.model.k.lora_B["other"].weight)
    assert not torch.allclose(plain(x), model_of("absent", torch.float32, torch.float32)(x))
    for _ in range(2):
        torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("several", "several active adapters with dropout"),
        ("dora", "DoRA with dropout"),
        ("lora_bias", None),
        ("absent", None),
        ("blocks in B", None),
        ("mica", None),
    ],
)
def test_dropout(kind, reason):
    """In eval mode all are fused."""
    if kind not in KINDS:
        pytest.skip("PEFT without it")
    plain = model_of(kind, torch.float32, torch.float32, dropout=0.4)
    fused = ada.accelerate(copy.deepcopy(plain))
    x = torch.randn(9, 40)
    for _ in range(2):
        assert not torch.allclose(fused.train()(x), fused(x))
        assert torch.equal(*[torch.manual_seed(0) and fused(x) for _ in range(2)])
    assert reasons(fused) == ({reason} if reason else set())
    before = sum(layer.fallback_calls for layer in ada.fusion_report(fused).values())
    plain.eval(), fused.eval()
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(fused(x), plain(x))
    after = sum(layer.fallback_calls for layer in ada.fusion_report(fused).values())
    assert after == before
    # where the low-rank product is zero, no mask shows
    for model in (plain.train(), fused.train()):
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("weight"):
                nn.init.zeros_(parameter)
    if reason is None:
        torch.testing.assert_close(fused(x), plain(x))


def test_norms_that_peft_keeps(monkeypatch):
    plain = model_of("dora", torch.float32, torch.float32).eval()
    fused = ada.accelerate(copy.deepcopy(plain))
    x = torch.randn(9, 40)
    fused(x)
    if not hasattr(dora, "ENABLE_DORA_CACHING"):
        pytest.skip("this PEFT keeps no norms")
    monkeypatch.setattr(dora, "ENABLE_DORA_CACHING", True)
    torch.testing.assert_close(fused(x), plain(x))
    assert reasons(fused) == {"DoRA whose norms PEFT caches"}


@pytest.mark.parametrize("kind", KINDS)
def test_words_and_pickles_are_pefts(kind, tmp_path):
    plain = model_of(kind, torch.float32, torch.float32)
    fused = ada.accelerate(copy.deepcopy(plain))
    x = torch.randn(9, 40)
    fused(x), fused(x)
    assert repr(fused) == repr(plain)
    assert fused.get_layer_status() == plain.get_layer_status()
    assert fused.get_model_status() == plain.get_model_status()
    torch.save(fused, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert repr(loaded) == repr(plain) and not fusable(loaded)
    assert loaded.get_layer_status() == plain.get_layer_status()
    torch.testing.assert_close(loaded(x), plain(x))
    torch.testing.assert_close(copy.deepcopy(fused)(x), plain(x))


@pytest.mark.parametrize("example", [True, False])
def test_a_new_dora_adapter_changes_no_bit(example):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(500, 300), nn.Sigmoid(), nn.Linear(300, 400, bias=False))
    x = torch.rand(9, 500)
    base = model(x)
    config = LoraConfig(target_modules=["0", "2"], use_dora=True)
    fused = ada.accelerate(
        get_peft_model(model, config).eval(), example={"input": x} if example else None
    )
    for _ in range(3):
        assert torch.equal(fused(x), base)
    assert sum(layer.fused_calls for layer in ada.fusion_report(fused).values()) >= 6
