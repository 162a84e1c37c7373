"""Private names of other libraries that are relied on: a failure here says which one is gone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adarank_fast.models import bitsandbytes_private, torch_private, transformers_private
from tests.tiny_models import tiny


def test_trees_of_torch():
    """torch.utils._pytree: order, and model outputs taken apart and put together again."""
    from transformers.modeling_outputs import BaseModelOutput

    a, b, c = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)
    tree = {"first": (a, [b, "text"]), "last": BaseModelOutput(last_hidden_state=c)}
    assert [x for x in torch_private.leaves(tree) if isinstance(x, torch.Tensor)] == [a, b, c]
    doubled = torch_private.map_leaves(torch.Tensor, lambda x: 2 * x, tree)
    assert doubled["first"][1][1] == "text" and isinstance(doubled["last"], BaseModelOutput)
    assert torch.equal(doubled["last"].last_hidden_state, 2 * c)


def test_versions_of_torch():
    """Tensor._version: counts writes in place, also those through a view."""
    x = torch.zeros(4)
    before = torch_private.version(x)
    x[:2].add_(1)
    assert torch_private.version(x) > before


def test_dispatch_mode_of_torch():
    """torch.utils._python_dispatch.TorchDispatchMode: meets every operation."""
    names = []

    class Listing(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Listing():
        torch.ones(2).add(1)
    assert [name.split(".")[0] for name in names] == ["ones", "add"]


def test_compiled_modules_of_torch():
    """OptimizedModule._orig_mod: the module inside."""
    model = nn.Linear(2, 2)
    assert torch_private.compiled_from(torch.compile(model)) is model
    assert torch_private.compiled_from(model) is None


@pytest.mark.parametrize("is_there", [True, False], ids=["base class", "without it"])
def test_convolutions_of_torch(monkeypatch, is_there):
    """torch.nn.modules.conv._ConvNd: the base of all convolutions; else their names tell."""
    if not is_there:
        monkeypatch.delattr(nn.modules.conv, "_ConvNd")
    assert torch_private.is_convolution(nn.Conv1d(2, 3, 4))
    assert torch_private.is_convolution(nn.ConvTranspose2d(2, 3, 4))
    assert not torch_private.is_convolution(nn.Linear(2, 3))


def test_attention_of_torch():
    """NonDynamicallyQuantizableLinear: what MultiheadAttention reads and never calls."""
    attention = nn.MultiheadAttention(4, 2)
    assert torch_private.is_read_not_called(attention.out_proj)
    assert not torch_private.is_read_not_called(nn.Linear(4, 4))


def test_marks_of_transformers(tmp_path):
    """Parameter._is_hf_initialized: set on what the checkpoint had, and on nothing else."""
    from transformers import BertForSequenceClassification

    tiny("bert").save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    loaded = transformers_private.came_from_checkpoint
    assert all(map(loaded, model.bert.encoder.parameters()))
    assert not any(map(loaded, model.classifier.parameters()))
    assert not any(map(loaded, tiny("bert").parameters()))


def test_hooks_of_accelerate():
    """Module._hf_hook: set by everything that spreads a model over devices."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    module = nn.Linear(2, 2)
    add_hook_to_module(module, ModelHook())
    assert transformers_private.is_moved_by_hooks(module)
    remove_hook_from_module(module)
    assert not transformers_private.is_moved_by_hooks(module)


def linear_4bit():
    layer = pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 64, quant_type="nf4")
    return layer.to("cpu")


def test_repacking_of_bitsandbytes(monkeypatch):
    """Linear4bit.support_avx512bf16_for_cpu and the way back from what it allows."""
    layer = linear_4bit()
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    bitsandbytes_private.set_repacking(layer, True)
    assert bitsandbytes_private.may_repack(layer)
    bitsandbytes_private.set_repacking(layer, False)
    assert not bitsandbytes_private.may_repack(layer)
    assert not bitsandbytes_private.is_repacked(layer)

    from bitsandbytes import functional

    assert callable(functional._convert_weight_packed_for_cpu_inverse)
    packed, state = functional._convert_weight_packed_for_cpu(
        layer.weight.data.clone(), layer.weight.quant_state
    )
    before = layer.weight.data.clone()
    layer.weight.data, layer.weight.quant_state = packed, state
    assert bitsandbytes_private.is_repacked(layer)
    bitsandbytes_private.undo_repacking(layer)
    assert not bitsandbytes_private.is_repacked(layer)
    assert torch.equal(layer.weight.data.flatten(), before.flatten())
    monkeypatch.delattr(functional, "_convert_weight_packed_for_cpu_inverse")
    with pytest.raises(ValueError, match="cannot undo its repacking"):
        bitsandbytes_private.undo_repacking(layer)


def test_int8_of_bitsandbytes():
    """Int8Params, its SCB and state.SCB, int8_vectorwise_dequant."""
    weight = torch.randn(8, 16)
    layer = pytest.importorskip("bitsandbytes").nn.Linear8bitLt(16, 8, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(8)})
    layer = layer.to("cpu")
    assert bitsandbytes_private.is_int8(layer)
    half_a_step = weight.abs().amax(1, keepdim=True) / 254
    in_half = weight.abs() * 2**-10  # it quantises the weights, and keeps the scales, of float16
    error = bitsandbytes_private.dequantise_int8(layer) - weight
    assert (error.abs() <= half_a_step + in_half).all()
