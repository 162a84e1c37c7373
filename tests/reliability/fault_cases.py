"""Public functions on tiny models, for exceptions at every call that they make."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertForSequenceClassification

import adarank_fast as ada
from adarank_fast.adapters.graph_blocks import graph_with
from adarank_fast.adapters.merge import merge_adapter
from adarank_fast.training.data import as_data
from tests.adapters.graph_stand_in import StandIn
from tests.reliability.faults import Case
from tests.tiny_models import batch, tiny
from tests.tiny_texts import EXAMPLES, tokenizer

KINDS = ("bert", "llama", "deberta", "mixtral")
INPUTS = {kind: batch(kind, lengths=(5, 3)) for kind in KINDS}
LLAMA = tiny("llama", layers=2, width=16)
MIXTRAL = tiny("mixtral", layers=1, width=16)
PLAN = ada.RankPlan.uniform(LLAMA, rank=2, target_modules="all-linear")


def predict(kind, **options):
    options = dict(target_modules="attention", trials=1, progress=False) | options

    return lambda model: ada.predict_ranks(model, [INPUTS[kind]], 2, **options)


FOLDERS = WeakKeyDictionary()  # of models


def resumed(model):
    """A prediction with a checkpoint, which a second one goes on with."""
    if model not in FOLDERS:
        FOLDERS[model] = tempfile.TemporaryDirectory()
    checkpoint = f"{FOLDERS[model].name}/probes"
    return predict("bert", output=first_token, checkpoint=checkpoint)(model)


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


def graphed():
    return graph_blocks(fused())


def recomputing():
    return accelerate_mlps(fused())


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


def class_names(model):
    """Not whether MLPs recompute: an error while one is looked at says that it does not."""
    return [type(layer).__name__ for layer in model.modules()]


def compiled(model):
    blocks = model.base_model.model.model.layers
    return [block._compiled_call_impl is not None for block in blocks]


def accelerate(model):
    return ada.accelerate(model, INPUTS["llama"])


def accelerate_mlps(model):
    return ada.accelerate(model, recompute_mlp=True)


def inject(model):
    return ada.inject(model, PLAN, example=INPUTS["llama"])


def compile_blocks(model):
    return ada.compile_blocks(model, backend="eager")


def graph_blocks(model):
    """With what stands in for CUDA's graphs; nothing is captured before a training step."""
    return graph_with(model, StandIn())


def uniform(model):
    return ada.RankPlan.uniform(model, 2, "all-linear")


def perturbation(model):
    return ada.perturbation(model.model.layers[0].self_attn.q_proj, "q_proj", 0)


CLASSIFIER = BertForSequenceClassification(tiny("bert", 1).config).eval()
LABELLED = as_data(EXAMPLES[:4])
CLASSIFIER.config.id2label = dict(enumerate(LABELLED.classes))


def evaluate(model):
    return ada.evaluate(model, LABELLED, tokenizer=tokenizer())


def benchmark(model):
    options = dict(target_modules="attention", repetitions=1, batch_size=1, max_length=8)
    return ada.benchmark(model, rank=2, **options)


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
        kind = "mixtral" if "Mixtral" in type(model).__name__ else kind
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


LONG = ("predict_ranks", "model_disagreement")  # their cases have most call sites in common
CASES = {
    name: Case(make, call, found, use, same, name.split()[0] if name.startswith(LONG) else name)
    for name, (make, call, found) in {
        "predict_ranks": (fresh(tiny("bert", 2)), predict("bert", output=first_token), trials),
        "predict_ranks of logits": (fresh(LLAMA), predict("llama", trials=2), trials),
        "predict_ranks one by one": (fresh(tiny("deberta", 1)), predict("deberta"), trials),
        "predict_ranks on a copy": (fresh(LLAMA), predict("llama", dtype="float32"), trials),
        "predict_ranks past the fast path": (fresh(ENCODER), predict_encoder, trials),
        "predict_ranks of experts": (
            fresh(MIXTRAL),
            predict("mixtral", target_modules="experts"),
            trials,
        ),
        "predict_ranks until they are sure": (
            fresh(tiny("bert", 1)),
            predict("bert", output=first_token, trials=ada.AdaptiveTrials(2, 3)),
            trials,
        ),
        "predict_ranks with a checkpoint": (fresh(tiny("bert", 1)), resumed, trials),
        "perturbation": (fresh(LLAMA), perturbation, lambda noise: noise[0].tolist()),
        "find_targets": (fresh(LLAMA), ada.find_targets, lambda found: [t.name for t in found]),
        "RankPlan.uniform": (fresh(LLAMA), uniform, lambda plan: list(plan.ranks.items())),
        "estimate_cost": (fresh(tiny("bert", 2)), cost, lambda cost: cost.flops),
        "inject": (fresh(LLAMA), inject, fused_layers),
        "accelerate": (fresh(PLAIN), accelerate, fused_layers),
        "accelerate again": (fused, accelerate, fused_layers),
        "fusion_report": (fused, ada.fusion_report, list),
        "restore": (fused, ada.restore, classes),
        "accelerate of MLPs": (fused, accelerate_mlps, class_names),
        "restore of MLPs": (recomputing, ada.restore, classes),
        "graph_blocks": (fused, graph_blocks, classes),
        "graph_blocks again": (graphed, graph_blocks, classes),
        "graph_report": (graphed, ada.graph_report, lambda report: report.blocks),
        "restore of graphed blocks": (graphed, ada.restore, classes),
        "compile_blocks": (fused, compile_blocks, compiled),
        "export_uniform": (fresh(PLAIN), export, lambda tensors: list(tensors.values())),
        "export_uniform of fused layers": (fused, export, lambda tensors: list(tensors.values())),
        "merge_adapter": (fresh(LLAMA), merge, lambda tensors: list(tensors.values())),
        "evaluate": (fresh(CLASSIFIER), evaluate, lambda metrics: list(metrics.values())),
        "benchmark": (
            fresh(tiny("llama", 1, 16)),
            benchmark,
            lambda report: list(report.results["arms"]),
        ),
        "model_disagreement": (fresh(LLAMA), models, torch.Tensor.tolist),
        "model_disagreement of adapters": (fresh(TWO), adapters, torch.Tensor.tolist),
    }.items()
}
