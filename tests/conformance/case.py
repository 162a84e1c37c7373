"""An architecture of the table as the steps see it: models, inputs, targets."""

from __future__ import annotations

import copy
import warnings
from functools import cached_property

import torch
from peft import PeftModel, get_peft_model

import adarank_fast as ada
from tests.conformance.architectures import Architecture
from tests.tiny_models import spread

RANKS = (3, 1, 5, 2, 8)
YES = "yes"


class Case:
    """An architecture's model, with what several steps need of it, made once.

    Attributes:
        base: the model without adapters; steps leave it alone.
        inputs: its batch.
        targets: every linear module and expert parameter that gets an adapter.
    """

    def __init__(self, architecture: Architecture) -> None:
        torch.manual_seed(0)
        self.row = architecture
        model = architecture.build()
        self.base = model.eval() if architecture.pretrained else spread(model)
        self.inputs = architecture.batch()
        self.names = [target.name for target in ada.find_targets(self.base, "all-linear")]
        parts = architecture.experts.split()
        self.experts = [t.name for t in ada.find_targets(self.base, parts)] if parts else []
        sizes = {
            t.name: (t.in_features, t.out_features)
            for t in ada.find_targets(self.base, self.names + self.experts)
        }
        ranks = {name: RANKS[i % len(RANKS)] for i, name in enumerate(sizes)}
        self.plan = ada.RankPlan(ranks, sizes)

    @cached_property
    def predicted(self) -> ada.RankPlan:
        """Two trials on every target."""
        return ada.predict_ranks(
            self.base,
            [self.inputs],
            average_rank=3,
            target_modules=self.names + self.experts,
            output=self.row.output,
            trials=2,
            progress=False,
        )

    def fused(self) -> PeftModel:
        """A fresh copy with fused adapters of mixed ranks, B not zero."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.nn.TransformerEncoderLayer ignores")
            model = ada.inject(copy.deepcopy(self.base), self.plan, example=self.inputs)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(noise, non_blocking=False).mul_(0.05)
        return model

    def plain(self, fused: PeftModel) -> PeftModel:
        """PEFT's own model with the same adapters."""
        config = copy.deepcopy(fused.peft_config["default"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            model = get_peft_model(copy.deepcopy(self.base), config)
        model.load_state_dict(fused.state_dict())
        return model
