"""The study's part without training: how far a plan depends on what its prediction looks at.

Each row of bench/results/study_plans.json is one prediction, "MODEL: WHAT IS DIFFERENT", and holds
the scores in the order of the model's modules. Everything else is a question of arithmetic, which
bench/results_page.py answers: ranks, rank correlations, how many modules change.
"""

from __future__ import annotations

import json
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
from bench.results_file import FOLDER, write_results

RESULTS = FOLDER / "study_plans.json"
EXPERIMENTS = {
    "outputs": "the paper's pooled l1 against other outputs and metrics",
    "accumulating": "exact against accumulating perturbation: bench/accumulating.py",
    "stability": "plans across seeds, sizes of the calibration set and its text",
}
MODELS = {"MiniLM": minilm, "MPNet-base": mpnet, "SmolLM2-135M": smollm2}
LANGUAGE = "SmolLM2-135M"
BLOCK = 64  # tokens of a language model's text
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


def looks() -> dict[str, dict[str, dict[str, Look]]]:
    """Experiment -> model -> what is different -> prediction."""
    outputs: dict[str, dict[str, Look]] = {}
    stability: dict[str, dict[str, Look]] = {}
    for model in ("MiniLM", "MPNet-base"):
        outputs[model] = {
            USUAL: Look(),
            "last hidden state": Look("last_hidden_state"),
            "first token": Look("first token"),
            "untrained pooler": Look("pooler"),
        }
        stability[model] = {
            **{f"seed {seed}": Look(seed=seed) for seed in range(1, 5)},
            **{f"{texts} texts": Look(texts=texts) for texts in (4, 8, 16, 64, 128)},
            "other questions": Look(skip=128),
            "yet other questions": Look(skip=160),
            "MR": Look(source="MR"),
        }
    usual = Look(texts=4, trials=3)
    logits = {f"logits, {m}": ("logits", m) for m in ("l1", "tv", "kl", "js", "argmax")}
    outputs[LANGUAGE] = {
        USUAL: usual,
        "last hidden state": replace(usual, output="last_hidden_state"),
        **{key: replace(usual, output=out, metric=m) for key, (out, m) in logits.items()},
    }
    stability[LANGUAGE] = {
        "seed 1": replace(usual, seed=1),
        "8 texts": replace(usual, texts=8),
        "other questions": replace(usual, skip=4),
        "MR": replace(usual, source="MR"),
    }
    return {"outputs": outputs, "stability": stability}


def predict(name: str, heard: Callable[[str], object]) -> None:
    """Make the predictions of an experiment that are missing."""
    if name == "accumulating":  # which has a file of its own
        return
    for model, mine in looks()[name].items():
        for key, look in mine.items():
            if (row := f"{model}: {key}") not in _rows():
                found = measure(model, look)
                write_results("study_plans", row, found)
                heard(f"{row}: {found['seconds']:.0f} s")


def progress(name: str) -> tuple[int, int]:
    """(predictions made, predictions planned)."""
    if name == "accumulating":
        return int((FOLDER / "accumulating.json").exists()), 1
    keys = {f"{model}: {key}" for model, mine in looks()[name].items() for key in mine}
    return len(keys & _rows().keys()), len(keys)


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


def _rows() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


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
