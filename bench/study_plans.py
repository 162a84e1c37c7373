"""The study's part without training: how far a plan depends on what its prediction looks at.

Each row of bench/results/study_plans.json is one prediction, "MODEL: WHAT IS DIFFERENT", and holds
the scores in the order of the model's modules. Everything else is a question of arithmetic, which
bench/results_page.py answers: ranks, rank correlations, how many modules change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import adarank_fast as ada
from adarank_fast.demo.assets import minilm, mpnet, mr, smollm2, trec
from adarank_fast.training.tokens import collate, encode_blocks, make_batches
from bench.results_file import read_results, write_results

EXPERIMENTS = {
    "outputs": "the paper's pooled l1 against other outputs and metrics",
    "accumulating": "exact against accumulating perturbation: bench/accumulating.py",
    "stability": "plans across seeds, sizes of the calibration set and its text",
}
MODELS = {"MiniLM": minilm, "MPNet-base": mpnet, "SmolLM2-135M": smollm2}
LANGUAGE = "SmolLM2-135M"
BLOCK = 64  # tokens of a language model's text
SEEDS, TEXTS = (1, 2, 3, 4), (4, 8, 16, 64, 128)
METRICS = ("l1", "tv", "kl", "js", "argmax")
USUAL = "as usual"  # the row that a model's others are compared with


@dataclass(frozen=True)
class Look:
    """One prediction, of `ada.predict_ranks`.

    Attributes:
        output: "auto" is the mean-pooled last hidden state here; also "first token".
        texts: how many, after `skip` others; of a language model blocks of `BLOCK` tokens.
        source: TREC or MR.
    """

    output: str = "auto"
    metric: str = "l1"
    seed: int = 0
    texts: int = 32
    skip: int = 0
    source: str = "TREC"
    trials: int = 5


Changes = dict[str, dict[str, dict[str, Any]]]
ENCODERS: Changes = {  # experiment -> what is different from `Look()`
    "outputs": {
        USUAL: {},
        "last hidden state": {"output": "last_hidden_state"},
        "first token": {"output": "first token"},
        "untrained pooler": {"output": "pooler"},
    },
    "stability": {
        **{f"seed {seed}": {"seed": seed} for seed in SEEDS},
        **{f"{texts} texts": {"texts": texts} for texts in TEXTS},
        "other questions": {"skip": 128},
        "yet other questions": {"skip": 160},
        "MR": {"source": "MR"},
    },
}
LANGUAGE_MODEL: Changes = {  # the same, from four texts and three trials
    "outputs": {
        USUAL: {},
        "last hidden state": {"output": "last_hidden_state"},
        **{f"logits, {metric}": {"output": "logits", "metric": metric} for metric in METRICS},
    },
    "stability": {
        "seed 1": {"seed": 1},
        "8 texts": {"texts": 8},
        "other questions": {"skip": 4},
        "MR": {"source": "MR"},
    },
}


def planned(name: str) -> dict[str, tuple[str, Look]]:
    """Row of the results -> (model, prediction); none of "accumulating", which has its own file."""
    rows: dict[str, tuple[str, Look]] = {}
    for model in MODELS:
        language = model == LANGUAGE
        usual = Look(texts=4, trials=3) if language else Look()
        for key, changes in (LANGUAGE_MODEL if language else ENCODERS).get(name, {}).items():
            rows[f"{model}: {key}"] = model, replace(usual, **changes)
    return rows


def predict(name: str, heard: Callable[[str], object]) -> None:
    """Make the predictions of an experiment that are missing."""
    for row, (model, look) in planned(name).items():
        if row not in read_results("study_plans"):
            found = measure(model, look)
            write_results("study_plans", {row: found})
            heard(f"{row}: {found['seconds']:.0f} s")


def progress(name: str) -> tuple[int, int]:
    """(predictions made, predictions planned)."""
    if name == "accumulating":
        return int(bool(read_results("accumulating"))), 1
    keys = planned(name).keys()
    return len(keys & read_results("study_plans").keys()), len(keys)


def measure(model: str, look: Look) -> dict[str, Any]:
    """Scores of one prediction, and what it took."""
    folder = MODELS[model]()
    kind: Any = AutoModelForCausalLM if look.output == "logits" else AutoModel
    batches = _batches(folder, look, model == LANGUAGE)
    masks = [batch["attention_mask"] for batch in batches]
    started, cpu_started = time.perf_counter(), time.process_time()
    plan = ada.predict_ranks(
        kind.from_pretrained(folder, dtype=torch.float32).eval(),
        batches,
        output=_first if look.output == "first token" else look.output,
        metric=look.metric,
        trials=look.trials,
        seed=look.seed,
        progress=False,
    )
    return {
        **asdict(look),
        "scores": [float(f"{score.mean:.7g}") for score in plan.scores.values()],
        "tokens": sum(int(mask.sum()) for mask in masks),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
    }


def _batches(folder: Path, look: Look, language: bool) -> Sequence[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for text, _ in (trec() if look.source == "TREC" else mr())[0]]
    chosen = slice(look.skip, look.skip + look.texts)
    if not language:
        return make_batches(tokenizer, texts[chosen], 16, 64)
    blocks = encode_blocks(tokenizer, texts[:1000], BLOCK)[chosen]
    return [collate([{k: v for k, v in block.items() if k != "labels"} for block in blocks], 0)]


def _first(outputs: Any) -> Tensor:
    return outputs.last_hidden_state[:, 0]
