"""Public functions on tiny models, for exceptions at every call that they make."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import adarank_fast as ada
from adarank_fast.adapters.merge import merge_adapter
from tests.reliability.faults import Case
from tests.tiny_models import batch, tiny

INPUTS = {kind: batch(kind, lengths=(5, 3)) for kind in ("bert", "llama", "deberta")}
LLAMA = tiny("llama", layers=2, width=16)
PLAN = ada.RankPlan.uniform(LLAMA, rank=2, target_modules="all-linear")


def predict(kind, **options):
    options = dict(target_modules="attention", trials=1, progress=False) | options

    return lambda model: ada.predict_ranks(model, [INPUTS[kind]], 2, **options)


def trials(plan):
    return [value for score in plan.scores.values() for value in score.trials]


def first_token(outputs):
    return outputs.last_hidden_state[:, 0]


def adapted(adapters=1):
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(LLAMA), config)
    for number in range(1, adapters):
        model.add_adapter(str(number), config)
    return model


PLAIN, TWO = adapted(), adapted(2)


def fused():
    return ada.accelerate(copy.deepcopy(PLAIN), example=INPUTS["llama"])


class Encoder(nn.Module):
    """Passes by its layers' modules while torch's fast path is on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.eval()

    def forward(self, x):
        return self.encoder(x)


X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
ENCODER = Encoder()


def fused_layers(model):
    """What is fused how, once the layers have been used."""
    model(**INPUTS["llama"])
    return [(name, layer.group) for name, layer in ada.fusion_report(model).items()]


def classes(model):
    return [type(layer) for layer in model.modules()]


def compiled(model):
    blocks = model.base_model.model.model.layers
    return [block._compiled_call_impl is not None for block in blocks]


def accelerate(model):
    return ada.accelerate(model, INPUTS["llama"])


def inject(model):
    return ada.inject(model, PLAN, example=INPUTS["llama"])


def compile_blocks(model):
    return ada.compile_blocks(model, backend="eager")


def predict_encoder(model):
    options = dict(target_modules="all-linear", trials=1, progress=False)
    return ada.predict_ranks(model, [{"x": X}], 2, **options)


def adapters(model):
    return ada.model_disagreement(model, [INPUTS["llama"]], adapters=["default", "1"], metric="tv")


def models(model):
    return ada.model_disagreement([model, LLAMA], [INPUTS["llama"]], metric="tv")


def cost(model):
    return ada.estimate_cost(model, [INPUTS["bert"]])


def written(write):
    """The tensors that `write` leaves in a folder; nothing, or all of it, if it is ended."""
    with tempfile.TemporaryDirectory() as parent:
        try:
            write(f"{parent}/out")
        except BaseException:
            if os.listdir(parent):  # ended after it was renamed
                tensors(parent)
            raise
        return tensors(parent)


def tensors(parent):
    assert os.listdir(parent) == ["out"]
    assert len(os.listdir(f"{parent}/out")) > 1
    (file,) = Path(parent, "out").glob("*.safetensors")
    return {name: x.flatten().tolist() for name, x in load_file(file).items()}


def export(model):
    return written(lambda folder: ada.export_uniform(model, folder))


@cache
def saved(model):
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name)
    return folder  # which goes with the process


def merge(_):
    base, adapter = saved(LLAMA).name, saved(PLAIN).name
    return written(lambda folder: merge_adapter(base, adapter, folder))


def run(model):
    with torch.no_grad():
        if isinstance(model, Encoder):
            return model(x=X).flatten().tolist()
        kind = "bert" if "Bert" in type(model).__name__ else "llama"
        kind = "deberta" if "Deberta" in type(model).__name__ else kind
        return model(**INPUTS[kind])[0].flatten().tolist()


def use(model):
    """A forward without dropout: its values; the modes are as before."""
    modes = [(module, module.training) for module in model.modules()]
    values = run(model.eval() if any(map(drops, model.modules())) else model)
    for module, mode in modes:
        module.training = mode
    return values


def drops(module):
    return isinstance(module, nn.Dropout) and module.p > 0


def same(one, two):
    """Equal, numbers up to the rounding of variants that are run alone."""
    if isinstance(one, (list, tuple)) and not isinstance(two, str):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, float):
        return math.isclose(one, two, rel_tol=1e-4, abs_tol=1e-6)
    return one == two


def fresh(model):
    return lambda: copy.deepcopy(model).train()


CASES = {
    name: Case(make, call, found, use, same)
    for name, (make, call, found) in {
        "predict_ranks": (fresh(tiny("bert", 2)), predict("bert", output=first_token), trials),
        "predict_ranks of logits": (fresh(LLAMA), predict("llama", trials=2), trials),
        "predict_ranks one by one": (fresh(tiny("deberta", 1)), predict("deberta"), trials),
        "predict_ranks on a copy": (fresh(LLAMA), predict("llama", dtype="float32"), trials),
        "predict_ranks past the fast path": (fresh(ENCODER), predict_encoder, trials),
        "estimate_cost": (fresh(tiny("bert", 2)), cost, lambda cost: cost.flops),
        "inject": (fresh(LLAMA), inject, fused_layers),
        "accelerate": (fresh(PLAIN), accelerate, fused_layers),
        "restore": (fused, ada.restore, classes),
        "compile_blocks": (fused, compile_blocks, compiled),
        "export_uniform": (fresh(PLAIN), export, lambda tensors: list(tensors.values())),
        "export_uniform of fused layers": (fused, export, lambda tensors: list(tensors.values())),
        "merge_adapter": (fresh(LLAMA), merge, lambda tensors: list(tensors.values())),
        "model_disagreement": (fresh(LLAMA), models, torch.Tensor.tolist),
        "model_disagreement of adapters": (fresh(TWO), adapters, torch.Tensor.tolist),
    }.items()
}
