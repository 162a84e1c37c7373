"""What may be done to a PEFT model: each step changes it, or computes something, from a seed."""

from __future__ import annotations

import copy
import gc
import tempfile
import threading
from functools import partial

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tests.tiny_models import VOCABULARY

GENERATE = ("llama", "gemma", "gpt2", "t5")
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def randomise(model, seed, adapter="default"):
    """As if trained; the same numbers in every model with these parameters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name or f"lora_A.{adapter}" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(noise)


class Steps:
    """The steps, each `name(model, rng) -> (model, tensors to compare)`, for one case."""

    def __init__(self, case):
        self.case = case
        self.keeps_a_graph = False  # with nodes that expect a gradient of the old shape

    def train(self, model, rng):
        return model.train(), []

    def eval(self, model, rng):
        return model.eval(), []

    def two_forwards(self, model, rng):
        model.zero_grad()
        first, second = (self.case.loss(model, seed) for seed in (1, 2))
        (first + second).backward()
        return model, self.case.gradients(model)

    def no_grad(self, model, rng):
        with torch.no_grad():
            return model, [self.case.output(model, 3)]

    def inference(self, model, rng):
        with torch.inference_mode():
            return model, [self.case.output(model, 4).clone()]

    def generate(self, model, rng):
        if (
            self.case.kind not in ("llama", "gemma", "gpt2", "t5")
            or self.case.dtype == torch.bfloat16
        ):
            return model, []  # rounding decides between words
        prompt = {k: v for k, v in self.case.inputs(5).items() if "decoder" not in k}
        training = model.training
        words = model.eval().generate(
            **prompt, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=VOCABULARY - 1
        )
        return model.train(training), [words]

    def second_adapter(self, model, rng):
        if "other" in model.peft_config:
            model.set_adapter("other")
        else:
            targets = rng.sample(self.case.targets, 1 + rng.randrange(len(self.case.targets)))
            model.add_adapter("other", self.case.config(targets=targets, r=3, rank_pattern={}))
            randomise(model, 5, "other")
            model.set_adapter("other")
            if hasattr(model, "prepared"):
                self.case.prepare(model)
        return model, []

    def first_adapter(self, model, rng):
        model.set_adapter("default")
        return model, []

    def both_adapters(self, model, rng):
        if "other" in model.peft_config:
            model.base_model.set_adapter(["default", "other"])
            model.zero_grad()
            self.case.loss(model, 6).backward()
            found = [*self.case.gradients(model), self.case.output(model, 6).detach()]
            model.set_adapter("default")
            return model, found
        return model, []

    def delete_adapter(self, model, rng):
        if "other" in model.peft_config:
            model.set_adapter("default")
            model.delete_adapter("other")
        return model, []

    def disable(self, model, rng):
        with model.disable_adapter():
            found = self.case.output(model, 7).detach()
        return model, [found]

    def merge(self, model, rng):
        if self.case.settings["lora_bias"]:
            return model, []  # PEFT refuses it where the base has no bias
        model.merge_adapter()
        found = self.case.output(model, 8).detach()
        model.unmerge_adapter()
        return model, [found]

    def save_and_load(self, model, rng):
        if model.active_adapters != ["default"] or not self.case.saves:
            return model, []
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            base = self.case.base()
            loaded = PeftModel.from_pretrained(base, folder, is_trainable=True)
        for name, parameter in loaded.named_parameters():
            parameter.data = parameter.data.to(model.get_parameter(name).dtype)
            parameter.data.copy_(model.get_parameter(name).data)
        if hasattr(model, "prepared"):
            loaded = self.case.prepare(loaded)
            loaded.prepared = True
        return loaded.train(model.training), []

    def deepcopy(self, model, rng):
        return copy.deepcopy(model), []

    def flip_requires_grad(self, model, rng):
        names = [n for n, p in model.named_parameters() if "lora_" in n or n.endswith("weight")]
        for name in rng.sample(names, min(3, len(names))):
            parameter = model.get_parameter(name)
            parameter.requires_grad_(not parameter.requires_grad)
        return model, []

    def optimizer_step(self, model, rng):
        self.case.loss(model, 9).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.optim.SGD(trained, lr=0.05).step()
        return model, []

    def loraplus_step(self, model, rng):
        """B learns at another rate than A."""
        self.case.loss(model, 9).backward()
        create_loraplus_optimizer(
            model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.0
        ).step()
        return model, []

    def autocast(self, model, rng):
        if self.case.dtype == torch.float64:
            return model, []
        with torch.autocast("cpu", torch.bfloat16):
            return model, [self.case.output(model, 10).detach().to(torch.bfloat16)]

    def checkpointing(self, model, rng):
        return model, self._checkpointed(model, use_reentrant=False)

    def reentrant_checkpointing(self, model, rng):
        return model, self._checkpointed(model, use_reentrant=True)

    def selective_checkpointing(self, model, rng):
        def policy(context, operator, *args, **kwargs):
            saved = operator in PRODUCTS
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = partial(create_selective_checkpoint_contexts, policy)
        return model, self._checkpointed(model, use_reentrant=False, context_fn=contexts)

    def _checkpointed(self, model, **arguments):
        model.zero_grad()
        ticket = torch.ones((), requires_grad=True, dtype=torch.float64)

        def compute(ticket):
            return self.case.loss(model, 11) * ticket

        checkpoint(compute, ticket, **arguments).backward()
        return self.case.gradients(model)

    def save_on_cpu(self, model, rng):
        model.zero_grad()
        with torch.autograd.graph.save_on_cpu():
            loss = self.case.loss(model, 12)
        loss.backward()
        self.keeps_a_graph = True  # torch frees it only with the model
        return model, self.case.gradients(model)

    def hook(self, model, rng):
        layer = rng.choice(lora_layers(model))
        inside = rng.choice(["itself", "base_layer", "lora_A"])
        module = layer if inside == "itself" else layer.base_layer
        if inside == "lora_A" and layer.active_adapters[0] in layer.lora_A:
            module = layer.lora_A[layer.active_adapters[0]]
        handle = module.register_forward_hook(lambda module, args, output: output * 1.5)
        found = [self.case.output(model, 13).detach()]
        handle.remove()
        return model, found

    def replace_data(self, model, rng):
        gc.collect()  # graphs that are still there expect the old shape
        layer = rng.choice(lora_layers(model))
        for name in layer.lora_A:
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            generator = torch.Generator().manual_seed(rng.randrange(1000))
            rank = len(A) if self.keeps_a_graph else rng.randrange(1, 9)
            new_A = 0.1 * torch.randn(rank, A.shape[1], generator=generator)
            new_B = 0.1 * torch.randn(B.shape[0], rank, generator=generator)
            A.grad = B.grad = None
            A.data, B.data = new_A.to(A.dtype), new_B.to(B.dtype)
        self.case.saves = False
        return model, []

    def set_scale(self, model, rng):
        layers = lora_layers(model)
        for layer in rng.sample(layers, min(2, len(layers))):
            for name in layer.lora_A:
                layer.set_scale(name, 1.0 + rng.randrange(4))
        self.case.saves = False
        return model, []

    def tensor_scale(self, model, rng):
        layer = rng.choice(lora_layers(model))
        for name in layer.scaling:
            layer.scaling[name] = torch.tensor(0.5 + rng.randrange(3))
        self.case.saves = False
        return model, []

    def swap_linear(self, model, rng):
        layer = rng.choice(lora_layers(model))
        if type(layer.base_layer) is nn.Linear:
            old = layer.base_layer.weight
            layer.base_layer.weight = nn.Parameter(old.detach() * 0.5, old.requires_grad)
        self.case.saves = False
        return model, []

    def threads(self, model, rng):
        if model.training:
            return model, []  # one generator for all threads
        found = [None] * 3

        def work(i):
            with torch.no_grad():
                found[i] = self.case.output(model, 14 + i, reseed=False)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return model, found


STEPS = sorted(name for name in vars(Steps) if not name.startswith("_"))
