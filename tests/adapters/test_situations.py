"""Situations around a forward in which fused layers once went wrong, each with its neighbours."""

from __future__ import annotations

import copy
import threading
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import adarank_fast as ada
from tests.adapters.fused_models import assert_equal, fusable, loss_of, mixed, reasons
from tests.tiny_models import batch

KINDS = ["llama", "bert", "gpt2", "t5"]


class Branches(nn.Module):
    """q, k and v read one tensor."""

    def __init__(self, width=24, linear=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (linear(width, width) for _ in range(3))

    def forward(self, x):
        return torch.sin(self.q(x)) + self.k(x) * self.v(x)


def branches(rank=5, dtype=torch.float32, dropout=0.0, **kwargs):
    """(plain, fused), as if trained."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=rank, target_modules=["q", "k", "v"], init_lora_weights=False, lora_dropout=dropout
    )
    plain = get_peft_model(Branches(**kwargs), config).to(dtype)
    return plain, ada.accelerate(copy.deepcopy(plain))


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def hidden(model, kind, seed=0):
    found = model(**batch(kind, seed=seed))
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["summed", "last first", "one without gradients"])
def test_two_forwards_before_a_backward(kind, order):
    plain = mixed(kind).eval()
    fused = ada.accelerate(copy.deepcopy(plain))
    for _ in range(3):
        for model in (plain, fused):
            model.zero_grad()
            first = loss_of(model, kind, 1)
            with torch.set_grad_enabled(order != "one without gradients"):
                second = loss_of(model, kind, 2)
            if order == "summed":
                (first + second).backward()
            else:
                for loss in (second, first) if second.requires_grad else (first,):
                    loss.backward()
        assert_equal((1.0, grads(fused)), (1.0, grads(plain)))


@pytest.mark.parametrize("gradients", [False, True])
def test_first_forwards_from_several_threads(gradients):
    plain = mixed("llama").eval()
    wanted = hidden(plain, "llama").detach()
    for _ in range(5):
        fused, found = ada.accelerate(copy.deepcopy(plain)), []

        def work(model, found):
            try:
                with torch.set_grad_enabled(gradients):
                    found += [hidden(model, "llama").detach() for _ in range(2)]
            except Exception as error:
                found.append(error)

        workers = [threading.Thread(target=work, args=(fused, found)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(found) == 8
        for output in found:
            torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 32])
def test_another_rank_put_into_data(kind, rank):
    plain = mixed(kind).eval()
    fused = ada.accelerate(copy.deepcopy(plain), example=batch(kind))
    for model in (plain, fused):
        hidden(model, kind)
        generator = torch.Generator().manual_seed(3)
        for layer in model.modules():
            if "default" in getattr(layer, "lora_A", {}):
                A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                A.data = torch.randn(rank, A.shape[1], generator=generator) * 0.1
                B.data = torch.randn(B.shape[0], rank, generator=generator) * 0.1
    torch.testing.assert_close(hidden(fused, kind), hidden(plain, kind), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter_rank", [2, 8])
def test_hot_swapping_another_scale(adapter_rank, tmp_path):
    other, _ = branches(adapter_rank)
    other.peft_config["default"].lora_alpha = 64
    other.save_pretrained(tmp_path)
    plain, fused = branches(4)
    x = torch.randn(6, 24)
    for model in (plain, fused):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        model.eval()
        before = model(x), model(x)
        hotswap_adapter(model, tmp_path, "default")
    try:
        expected = plain(x)
    except RuntimeError:  # PEFT 0.18 takes no adapter of a smaller rank
        assert adapter_rank < 8
        return
    torch.testing.assert_close(fused(x), expected)
    assert not torch.allclose(fused(x), before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("saved", ["products", "everything", "nothing", "every second"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_selective_checkpointing(dtype, saved, dropout):
    plain, fused = branches(dtype=dtype, dropout=dropout)
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    seen = []

    def policy(context, operator, *args, **kwargs):
        if not context.is_recompute:
            seen.append(operator)
        keep = {
            "products": operator in products,
            "everything": True,
            "nothing": False,
            "every second": operator in products and args[0].shape[0] % 2 == 0,
        }[saved]
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    x = torch.randn(10, 24, dtype=dtype)
    reference = plain if dropout == 0.0 else fused
    reference.train()(x)
    if saved == "everything" and dropout:
        for model in (plain.train(), fused.train()):  # torch refuses masks drawn in place
            output = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
            with pytest.raises(RuntimeError, match="mutated"):
                output.sum().backward()
        return
    for _ in range(3):
        found = []
        for model in (reference, fused):
            model.zero_grad()
            torch.manual_seed(4)
            whole = model is plain or (dropout and not found)
            output = model(x) if whole else checkpoint(
                model, x, use_reentrant=False, context_fn=contexts
            )  # fmt: skip
            output.square().sum().backward()
            found.append(grads(model))
        assert_equal((1.0, found[1]), (1.0, found[0]), 0.05 if dtype == torch.bfloat16 else 1e-5)
    assert seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_groups_are_found_without_gradients_in_train_mode(kind, mode):
    fused = ada.accelerate(mixed(kind)).train()
    with getattr(torch, mode)():
        hidden(fused, kind)
    for _ in range(3):
        hidden(fused, kind).sum().backward()
    largest = max(len(layer.group) for layer in ada.fusion_report(fused).values())
    assert largest == {"llama": 3, "bert": 3, "gpt2": 1, "t5": 3}[kind]


@pytest.mark.parametrize("undo", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_in_an_unloaded_model(kind, undo):
    fused = ada.accelerate(mixed(kind), example=batch(kind))
    loss_of(fused, kind).backward()
    base = getattr(fused, undo)()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module in base.modules():
        assert not any(getattr(module, name) for name in hooks)
        assert not hasattr(module, "_adarank") and "Fused" not in type(module).__name__


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_pefts(kind):
    plain = mixed(kind)
    fused = ada.accelerate(copy.deepcopy(plain))
    report = ada.fusion_report(fused)
    assert str(report).splitlines()[0].endswith("no forward yet")
    assert repr(report) == f"FusionReport({str(report).splitlines()[0]}); .to_frame()"
    assert report._repr_html_() == f"<pre>{report}</pre>"
    pytest.importorskip("pandas")
    frame = report.to_frame()
    assert list(frame.index) == list(report) and frame["fused"].all()
    assert repr(fused) == repr(plain)
    assert fused.get_layer_status() == plain.get_layer_status()
    assert fused.get_model_status() == plain.get_model_status()
    hidden(fused, kind)
    assert str(ada.fusion_report(fused)).splitlines()[0].endswith("100.0% of calls fused")


class Bent(nn.Linear):
    """Its output is not its product, and it keeps what it returned."""

    def forward(self, x):
        self.kept = torch.tanh(super().forward(x))
        return self.kept


@pytest.mark.parametrize("train_base", [False, True])
def test_subclasses_of_linear_keep_their_forward(train_base):
    plain, fused = branches(linear=Bent)
    x = torch.randn(6, 24, requires_grad=True)
    for _ in range(2):
        found = []
        for model in (plain, fused):
            model.zero_grad()
            for layer in (model.base_model.model.q, model.base_model.model.k):
                layer.base_layer.requires_grad_(train_base)
            x.grad = None
            model(x).square().sum().backward()
            kept = model.base_model.model.q.base_layer.kept
            assert kept.abs().max() <= 1  # nothing was added into it
            found.append({**grads(model), "x": x.grad})
        assert_equal((1.0, found[1]), (1.0, found[0]))


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_by_jit(kind):
    plain = mixed(kind).eval()
    fused = ada.accelerate(copy.deepcopy(plain), example=batch(kind))
    ids = batch(kind)["input_ids"]
    options = {} if kind == "bert" else {"use_cache": False}

    class Call(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, **options)[0]

    traced = torch.jit.trace(Call(fused), (ids,), strict=False, check_trace=False)
    torch.testing.assert_close(traced(ids), Call(plain)(ids), rtol=1e-4, atol=1e-5)
    assert "traced by torch.jit" in reasons(fused)
    torch.testing.assert_close(Call(fused)(ids), Call(plain)(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 7, 16])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_first_forward_is_bit_equal_to_later_ones(dtype, rank, gradients):
    _, fused = branches(rank, dtype, width=96)
    x = torch.randn(37, 96, dtype=dtype)
    with torch.set_grad_enabled(gradients):
        first = fused(x)
        assert torch.equal(first, fused(x)) and torch.equal(first, fused(x))


def test_forward_mode_and_function_transforms():
    plain, fused = branches()
    fused(torch.randn(3, 24))
    x, tangent = torch.randn(6, 24), torch.randn(6, 24)
    found = []
    for model in (plain, fused):
        with forward_ad.dual_level():
            output = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent)))
        found.append((output.primal, output.tangent, torch.func.vmap(model)(x)))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert {"forward-mode differentiation", "inside a torch.func transform"} <= reasons(fused)


def test_replicas_of_data_parallel_fall_back():
    plain, fused = branches()
    x = torch.randn(6, 24)
    for layer in fusable(fused):
        layer._is_replica = True
    torch.testing.assert_close(fused(x), plain(x))
    assert reasons(fused) == {"a replica of DataParallel"}
