"""Prediction against its floor and against the naive loop, in one process. Linux only.

    python -m pytest bench/bench_prediction.py -s
    python -m pytest bench/bench_prediction.py -s -k mpnet

The floor is the measured time of the model's own forward, in the same type, over what no replay can
avoid: for every probe the blocks from the perturbed one on, for the unpadded tokens, and for a
language model its head and the plainest reduction. The GEMM floor is their matrix products alone,
at the rate of one large product. The naive loop runs full, padded forwards and forms full outputs;
it is timed on a sample of probes across depth and module type, and extrapolated.

Rounds alternate between floor and prediction; a prediction is compared with the mean of the floors
before and after it. What is predicted is checked against the naive loop
before any time is reported; figures go to bench/results/prediction.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import adarank_fast as ada
from adarank_fast.demo.assets import minilm, mpnet, mr, smollm2, trec
from adarank_fast.prediction.noise import Noise
from bench.naive import Problem, across
from bench.results_file import peak_resident, write_results

TOKENS = 2048  # of a folded batch in the floor
SAMPLE = 24  # probes of the naive loop that are timed


@dataclass
class Case(Problem):
    """What is predicted, and its floor.

    Attributes:
        floored: the model in the dtype of the probes, whose blocks give the floor.
        blocks: where they are in it.
    """

    floored: Any
    blocks: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokens = int(self.batch["attention_mask"].sum())
        self.head = self.floored.get_output_embeddings() if self.metric == "tv" else None

    def naive_seconds(self) -> float:
        """Of all probes, extrapolated from a stratified sample."""
        sample = across(self.modules, SAMPLE)
        start = time.perf_counter()
        self.naive(sample, precise=False)
        return (time.perf_counter() - start) / len(sample) * len(self.modules) * self.trials

    def probes(self, by_block: Sequence[float], head: float) -> float:
        """Sum over all probes of what the blocks from the perturbed one on take, and the head."""
        firsts = [int(target.block.rsplit(".", 1)[-1]) for target in self.targets]
        return self.trials * sum(sum(by_block[first:]) + head for first in firsts)

    def floor_seconds(self) -> float:
        blocks = list(self.floored.get_submodule(self.blocks))
        head = head_seconds(self.head, self.tokens) if self.head is not None else 0.0
        return self.probes(block_seconds(self.floored.base_model, blocks, self.batch), head)

    def flops(self) -> float:
        """The products' alone, 2 FLOP a weight and token."""
        blocks = self.floored.get_submodule(self.blocks)
        by_block = [sum(p.numel() for p in b.parameters() if p.dim() == 2) for b in blocks]
        head = self.head.weight.numel() if self.head is not None else 0
        return 2 * self.tokens * self.probes(by_block, head)


def encoder(folder: Callable[[], Any], dtype: torch.dtype | None = None) -> Case:
    """A sentence encoder and 64 TREC questions in one padded batch."""
    model = AutoModel.from_pretrained(folder()).eval()
    floored = AutoModel.from_pretrained(folder(), dtype=dtype).eval() if dtype else model
    texts = [text for text, _ in trec()[0][:64]]
    tokenizer = AutoTokenizer.from_pretrained(folder())
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))

    options = {"target_modules": "attention", "metric": "l1", "trials": 5, "dtype": dtype}
    return Case(model, batch, options, floored, "encoder.layer")


def language_model(tokens: int, length: int) -> Case:
    """SmolLM2-135M and `tokens` tokens of film reviews in rows of `length`."""
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    text = "\n".join(text for text, _ in mr()[0][:200])
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0, :tokens].view(-1, length)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"target_modules": "all-linear", "metric": "tv", "trials": 1}
    return Case(model, batch, options, model, "model.layers")


@torch.no_grad()
def block_seconds(
    base: nn.Module, blocks: list[nn.Module], batch: dict[str, Tensor]
) -> list[float]:
    """Seconds each block of the model's own forward takes for the batch's unpadded tokens.

    Timed inside whole forwards over items of one length, folded to about `TOKENS` tokens, at up to
    four lengths; scaled by tokens.
    """
    lengths = batch["attention_mask"].sum(1)
    distinct = lengths.unique().tolist()
    chosen = {distinct[round(i * (len(distinct) - 1) / 3)] for i in range(4)}
    spent = [0.0] * len(blocks)
    tokens = 0
    for length in sorted(chosen):
        rows = (lengths == length).nonzero()[:, 0]
        folds = max(1, TOKENS // (length * len(rows)))
        part = {k: v[rows][:, :length].repeat(folds, 1) for k, v in batch.items()}
        with timed(blocks) as clock:
            base(**part)
        tokens += folds * length * len(rows)
        spent = [a + b for a, b in zip(spent, clock, strict=True)]
    return [seconds * int(lengths.sum()) / tokens for seconds in spent]


@contextmanager
def timed(blocks: list[nn.Module]) -> Iterator[list[float]]:
    """Seconds of each block's forward."""
    seconds = [0.0] * len(blocks)

    def tick(*_: Any, index: int, sign: int) -> None:
        seconds[index] += sign * time.perf_counter()

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            before, after = (partial(tick, index=index, sign=sign) for sign in (-1, 1))
            hooks.callback(block.register_forward_pre_hook(before).remove)
            hooks.callback(block.register_forward_hook(after).remove)
        yield seconds


@torch.no_grad()
def head_seconds(head: nn.Linear, tokens: int) -> float:
    """The head's product, a softmax and half the sum of |p - q|, q given, in chunks of tokens."""
    hidden = torch.randn(tokens, head.in_features, dtype=head.weight.dtype)
    reference = torch.randn(128, head.out_features).softmax(-1)
    start = time.perf_counter()
    for chunk in hidden.split(128):
        p = torch.nn.functional.linear(chunk, head.weight).float().softmax(-1)
        p.sub_(reference[: len(p)]).abs_().sum(-1)
    return time.perf_counter() - start


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP per second of one large product."""
    a, b = torch.randn(2048, 1024, dtype=dtype), torch.randn(1024, 2048, dtype=dtype)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * 2048 * 1024 * 2048 / timer.blocked_autorange().median


@contextmanager
def noise_clock() -> Iterator[list[float]]:
    """Seconds spent drawing noise."""
    spent, draw = [0.0], Noise.__init__

    def counted(self: Any, *args: Any) -> None:
        start = time.perf_counter()
        draw(self, *args)
        spent[0] += time.perf_counter() - start

    with patch.object(Noise, "__init__", counted):
        yield spent


def check_float32(case: Case) -> dict[str, Any]:
    """All modules, the first trial: the naive loop's numbers and ranks."""
    means, plan = case.naive(case.modules), case.predict(trials=1)
    found = {module: score.trials[0] for module, score in plan.scores.items()}
    assert found == pytest.approx(means, rel=1e-5)
    assert plan.ranks == ada.allocate_ranks(means, 8, sizes=plan.sizes)
    checked = "first trial of every module within 1e-5 of the naive loop, ranks equal"
    return {"checked": f"{case.tokens} tokens, {checked}"}


def check_bfloat16(case: Case) -> dict[str, Any]:
    """At least 95% of the modules within one rank of the float32 plan."""
    full, ranks = case.predict(dtype=None).ranks, case.predict().ranks
    far = {m: (full[m], ranks[m]) for m in full if abs(full[m] - ranks[m]) > 1}
    assert len(far) <= 0.05 * len(full), far
    equal = sum(full[m] == ranks[m] for m in full)
    return {"same_rank_as_float32": equal, "further_than_one_rank": far}


CASES: dict[str, tuple[Callable[[], Case], int]] = {  # and how many rounds
    "minilm-float32": (lambda: encoder(minilm), 5),
    "minilm-bfloat16": (lambda: encoder(minilm, torch.bfloat16), 5),
    "mpnet-float32": (lambda: encoder(mpnet), 3),
    "mpnet-bfloat16": (lambda: encoder(mpnet, torch.bfloat16), 3),
    "smollm2-float32": (lambda: language_model(2048, 256), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_prediction(benchmark, capsys, name):
    make, rounds = CASES[name]
    case, low = make(), name.endswith("bfloat16")
    if low:
        checked = check_bfloat16(case)
    else:  # a language model on less, or the naive loop takes hours
        checked = check_float32(language_model(128, 64) if case.head is not None else case)
    case.floor_seconds()  # to warm up
    with peak_resident() as ordinary, torch.no_grad():
        case.model(**case.batch)
    noises, peaks, around = [], [], []

    def predict() -> None:
        with noise_clock() as spent, peak_resident() as peak:
            case.predict()
        noises.append(spent[0])
        peaks.append(peak[1])

    benchmark.pedantic(predict, setup=lambda: around.append(case.floor_seconds()), rounds=rounds)
    around.append(case.floor_seconds())
    ours = list(benchmark.stats.stats.data)
    floors = [(before + after) / 2 for before, after in pairwise(around)]
    naive = case.naive_seconds()
    row = {
        "seconds": ours,
        "floor_seconds": floors,
        "over_floor": median(a / b for a, b in zip(ours, floors, strict=True)),
        "naive_seconds_extrapolated": naive,
        "naive_over_ours": naive / median(ours),
        "gemm_floor": case.flops() / gemm_rate(torch.bfloat16 if low else torch.float32),
        "noise_share": sum(noises) / sum(ours),
        "peak_over_ordinary_forward": max(peaks) / ordinary[1],
        "modules": len(case.modules),
        "trials": case.trials,
        "tokens": case.tokens,
        "padded_tokens": case.batch["input_ids"].numel(),
        **checked,
    }
    benchmark.extra_info.update(row)
    report(capsys, name, row)


def test_adaptive_trials(capsys):
    """How many trials adaptive sampling saves against as many for every module."""
    plan = encoder(minilm).predict(budget=32, trials=ada.AdaptiveTrials(2, 40))
    counts = [len(score.trials) for score in plan.scores.values()]
    all_alike = len(counts) * max(counts)
    row = {
        "average_rank": 32,
        "trials": sum(counts),
        "trials_if_all_had_as_many": all_alike,
        "saved_ratio": all_alike / sum(counts),
        "fewest": min(counts),
        "most": max(counts),
    }
    report(capsys, "minilm-adaptive", row)


def report(capsys: Any, name: str, row: dict[str, Any]) -> None:
    with capsys.disabled():
        print(f"\n{name}: {row}")
        write_results("prediction", {name: row})
