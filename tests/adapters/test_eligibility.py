"""What about a PEFT layer keeps a call from being fused, named as `fusion_report` names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adarank_fast.adapters.eligibility import dropout_of, why_not
from adarank_fast.adapters.peft_private import caches_dora

X = torch.zeros(2, 8)


class Halved(nn.Dropout):
    """A dropout of one's own."""


class Scaled(nn.Linear):
    """A lora_A that is not simply one product."""


def layer_of(**options: Any) -> Any:
    model = nn.Sequential(nn.Linear(8, 6))
    config = LoraConfig(r=2, target_modules=["0"], **options)
    return get_peft_model(model, config).base_model.model[0]


def set_hf_hook(layer: Any) -> None:
    layer.lora_A["default"]._hf_hook = None


def use_more_ranks(layer: Any) -> None:
    layer.lora_A["default"] = nn.Linear(8, 3, bias=False)


CHANGES: dict[str, Callable[[Any], object]] = {
    "": lambda layer: None,
    "dropout is a Halved": lambda layer: layer.lora_dropout.update({"default": Halved(0.5)}),
    "lora_A is a Scaled": lambda layer: layer.lora_A.update({"default": Scaled(8, 2)}),
    "lora_A and lora_B do not fit each other": use_more_ranks,
    "hooks inside the layer": lambda layer: layer.lora_B["default"].register_full_backward_hook(
        lambda *_: None
    ),
    "offloaded": set_hf_hook,
    "a forward replaced inside the layer": lambda layer: setattr(
        layer.base_layer, "forward", lambda x: x
    ),
    "base layer is a Identity": lambda layer: setattr(layer, "base_layer", nn.Identity()),
    "adapters disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "a replica of DataParallel": lambda layer: setattr(layer, "_is_replica", True),
    "input and weight differ in dtype": lambda layer: layer.base_layer.double(),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_reasons(reason: str) -> None:
    layer = layer_of()
    CHANGES[reason](layer)
    assert why_not(layer, X) == reason


def test_what_the_input_or_who_watches_keeps_from_fusing() -> None:
    layer = layer_of()
    assert why_not(layer, X.long()) == "input and weight differ in dtype"
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not(layer, X.double()) == ""
        assert why_not(layer, X.long()) == "integer input"
    inside: list[str] = []
    torch.func.vmap(lambda x: inside.append(why_not(layer, x)) or x)(X)
    with torch.autograd.forward_ad.dual_level():
        inside.append(why_not(layer, X))
    assert inside == ["inside a torch.func transform", "forward-mode differentiation"]


def test_dora() -> None:
    layer = layer_of(use_dora=True)
    assert why_not(layer, X) == ""
    layer.lora_magnitude_vector["default"] = nn.Identity()
    assert why_not(layer, X) == "a LoRA variant (Identity)"
    layer.lora_variant["default"] = object()
    assert why_not(layer, X) == "a LoRA variant (object)"
    dropping = layer_of(use_dora=True, lora_dropout=0.1)
    assert why_not(dropping, X) == "DoRA with dropout"
    cached = "DoRA whose norms PEFT caches" if caches_dora() else ""
    assert why_not(dropping.eval(), X) == cached


def test_the_dropout_in_force() -> None:
    layer = layer_of(lora_dropout=0.25)
    assert dropout_of(layer) == 0.25 and dropout_of(layer.eval()) == 0.0
    layer.set_adapter([])
    assert dropout_of(layer) is None
