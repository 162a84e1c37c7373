"""What is used of PEFT and torch that is not public: which name broke, if one did.

A failure here after an upgrade says what `peft_private.py` or `torch_private.py` must do anew.
"""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from adarank_fast.adapters import peft_private, torch_private

PEFT = [
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
    ("peft.tuners.tuners_utils", "check_target_module_exists"),
    ("peft.utils.other", "get_pattern_key"),
]


@pytest.mark.parametrize("module, name", [*PEFT, ("peft.tuners.lora.bnb", "Linear4bit")])
def test_peft_has(module, name):
    assert hasattr(importlib.import_module(module), name), f"peft no longer has {module}.{name}"


@pytest.mark.parametrize(
    "name", ["force_parameter_static_shapes", "force_nn_module_property_static_shapes"]
)
def test_torch_has_the_compilers_setting(name):
    assert hasattr(torch._dynamo.config, name), f"torch no longer has torch._dynamo.config.{name}"


def check_peft(private):
    config = LoraConfig(target_modules=["q", "v"], exclude_modules=["b.v"])
    chosen = [private.is_target(config, path) for path in ("a.q", "b.v", "a.qq", "a.v")]
    assert chosen == [True, False, False, True]
    pattern = {"^a.q": 3, "q": 5}
    assert [private.pattern_value(pattern, path, 8) for path in ("a.q", "b.q", "a.v")] == [3, 5, 8]
    assert issubclass(private.TorchaoLoraLinear, lora.Linear)
    assert all(issubclass(layer, lora.LoraLayer) for layer in private.bitsandbytes_layers())


def test_peft():
    check_peft(peft_private)


def test_peft_without_these_names(monkeypatch):
    """The fallbacks do the same."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft.tuners.lora.torchao", None)
        for module, name in PEFT[1:]:
            patch.delattr(f"{module}.{name}")
        specification = importlib.util.find_spec(peft_private.__name__)
        without = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(without)
    assert without.TorchaoLoraLinear is not peft_private.TorchaoLoraLinear
    check_peft(without)


def test_compiled_modules_are_recognised():
    plain, in_place = nn.Linear(2, 2), nn.Linear(2, 2)
    in_place.compile(backend="eager")
    assert not torch_private.is_compiled(plain), "a plain module counts as compiled"
    assert torch_private.is_compiled(in_place), "module.compile() sets no _compiled_call_impl"
    compiled = torch.compile(plain, backend="eager")
    assert torch_private.is_compiled(compiled), "torch.compile(module) sets no _orig_mod"


def test_functions_of_constant_result_are_run_when_traced():
    calls = []

    @torch_private.constant_result
    def noted():
        calls.append(1)
        return 2

    assert noted() == 2
    assert torch.compile(lambda x: x * noted(), backend="eager", fullgraph=True)(
        torch.ones(1)
    ) == torch.tensor([2.0]), "torch no longer reads _dynamo_marked_constant"
    assert len(calls) == 2


def test_a_setting_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(torch._dynamo, "config", object())
    with pytest.raises(RuntimeError, match="has no torch._dynamo.config.force_parameter_static"):
        torch_private.parameter_shape_settings()
