"""Hot swaps of mixed-rank adapters, as docs/serving.md tells to make them."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import adarank_fast as ada
from tests.tiny_models import batch, tiny

BASE, INPUTS = tiny("llama", 2), batch("llama")


def mixed(seed, **patterns):
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **patterns
    )
    return get_peft_model(copy.deepcopy(BASE), config).eval()


def logits(model):
    with torch.no_grad():
        model(**INPUTS)
        return model(**INPUTS).logits


@pytest.mark.parametrize("prepare", [False, True])
def test_uniform_exports_can_be_swapped(tmp_path, prepare):
    first = mixed(1, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3})
    second = mixed(2, rank_pattern={"v_proj": 8})
    for name, model in (("first", first), ("second", second)):
        ada.export_uniform(model, tmp_path / name, rank=8)
    served = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "first").eval()
    if prepare:
        prepare_model_for_compiled_hotswap(served)
    ada.accelerate(served)
    assert torch.allclose(logits(served), logits(first), atol=1e-5)
    hotswap_adapter(served, tmp_path / "second", "default")
    assert torch.allclose(logits(served), logits(second), atol=1e-5)
    assert all(layer.fused for layer in ada.fusion_report(served).values())
    served.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "again").eval()
    assert torch.allclose(logits(again), logits(second), atol=1e-5)
