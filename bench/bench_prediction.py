"""Prediction against its floor and against the naive loop, in one process.

    python -m pytest bench/bench_prediction.py
    python -m pytest bench/bench_prediction.py -k mpnet

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

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import adarank_fast as ada
from adarank_fast.demo.assets import minilm, mpnet, mr, smollm2, trec
from adarank_fast.models.outputs import mean_pool
from adarank_fast.prediction import prober as probing
from bench.naive import across, naive_disagreements
from bench.results_file import write_results

TOKENS = 2048  # of a folded batch in the floor
SAMPLE = 24  # probes of the naive loop that are timed


def pooled(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
    return mean_pool(outputs.last_hidden_state, batch["attention_mask"])


def encoder(folder: Callable[[], Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A sentence encoder and 64 TREC questions in one padded batch."""
    model = AutoModel.from_pretrained(folder()).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder())
    texts = [text for text, _ in trec()[0][:64]]
    return model, dict(tokenizer(texts, padding=True, return_tensors="pt"))


def language_model(tokens: int, length: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """SmolLM2-135M and `tokens` tokens of film reviews in rows of `length`."""
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    text = "\n".join(text for text, _ in mr()[0][:200])
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0, :tokens].view(-1, length)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def block_seconds(
    model: nn.Module, blocks: list[nn.Module], batch: dict[str, Tensor]
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
        base = (
            model.get_submodule(getattr(model, "base_model_prefix", ""))
            if hasattr(model, "lm_head")
            else model
        )
        with timed(blocks) as clock:
            base(**part)
        tokens += folds * length * len(rows)
        spent = [a + b for a, b in zip(spent, clock, strict=True)]
    return [seconds * int(lengths.sum()) / tokens for seconds in spent]


@contextmanager
def timed(blocks: list[nn.Module]) -> Iterator[list[float]]:
    seconds = [0.0] * len(blocks)
    hooks = []
    for index, block in enumerate(blocks):

        def before(*_: Any, index: int = index) -> None:
            seconds[index] -= time.perf_counter()

        def after(*_: Any, index: int = index) -> None:
            seconds[index] += time.perf_counter()

        hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def head_seconds(model: nn.Module, tokens: int) -> float:
    """The head's product, a softmax and half the sum of |p - q|, q given, in chunks of tokens."""
    head = model.get_output_embeddings()
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
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * 2048 * 1024 * 2048 / statistics.median(seconds)


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """Resident memory of this process at most, sampled every two milliseconds."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            with open("/proc/self/statm") as file:
                resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            peak[0] = max(peak[0], resident)
            stop.wait(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


@contextmanager
def noise_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds spent drawing noise."""
    spent, draw = [0.0], probing._Noise.__init__

    def counted(self: Any, *args: Any) -> None:
        start = time.perf_counter()
        draw(self, *args)
        spent[0] += time.perf_counter() - start

    with monkeypatch.context() as patch:
        patch.setattr(probing._Noise, "__init__", counted)
        yield spent


def naive_seconds(model, batch, modules, read, metric="l1") -> float:
    """Seconds a probe of the naive loop, over a stratified sample."""
    sample = across(modules, SAMPLE)
    start = time.perf_counter()
    naive_disagreements(model, [batch], sample, read, 1, metric=metric, precise=False)
    return (time.perf_counter() - start) / len(sample)


ROWS = {
    # name: (folder, dtype of the probes, trials, rounds)
    "minilm-float32": (minilm, None, 5, 5),
    "minilm-bfloat16": (minilm, torch.bfloat16, 5, 5),
    "mpnet-float32": (mpnet, None, 5, 3),
    "mpnet-bfloat16": (mpnet, torch.bfloat16, 5, 3),
}


@pytest.mark.parametrize("name", ROWS)
def test_encoders(benchmark, capsys, monkeypatch, name):
    folder, dtype, trials, rounds = ROWS[name]
    model, batch = encoder(folder)
    targets = ada.find_targets(model, "attention")
    modules = {target.name: target.path for target in targets}
    blocks = list(model.encoder.layer)
    floored = model if dtype is None else AutoModel.from_pretrained(folder(), dtype=dtype).eval()
    floors: list[float] = []

    def predict(count=trials, **kwargs):
        return ada.predict_ranks(
            model, [batch], 8, trials=count, dtype=dtype, progress=False, **kwargs
        )

    def floor_round() -> None:
        seconds = block_seconds(floored, list(floored.encoder.layer), batch)
        floors.append(
            trials * sum(sum(seconds[int(t.block.rsplit(".", 1)[-1]) :]) for t in targets)
        )

    exact = naive_disagreements(model, [batch], modules, pooled, 1)
    plan = predict()  # a warm-up, and checked
    check = check_float32 if dtype is None else check_bfloat16
    agreement = check(model, batch, plan, exact, predict)
    floor_round(), floors.clear()
    benchmark.pedantic(predict, setup=floor_round, rounds=rounds)
    floor_round()
    ours = list(benchmark.stats.stats.data)
    with noise_clock(monkeypatch) as noise:
        predict()
    with peak_bytes() as ordinary, torch.no_grad():
        model(**batch)
    with peak_bytes() as peak:
        predict(1)
    naive = naive_seconds(model, batch, modules, pooled) * len(modules) * trials
    flops = probe_flops(targets, blocks, int(batch["attention_mask"].sum())) * trials
    report(
        benchmark, capsys, name, ours, floors, naive,
        gemm_floor=flops / gemm_rate(dtype or torch.float32),
        noise_share=noise[0] / statistics.median(ours),
        peak_over_ordinary_forward=peak[0] / ordinary[0],
        modules=len(modules), trials=trials, items=len(batch["input_ids"]),
        tokens=int(batch["attention_mask"].sum()), padded_tokens=batch["input_ids"].numel(),
        **agreement,
    )  # fmt: skip


def check_float32(model, batch, plan, exact, predict) -> dict[str, Any]:
    """All modules, the first trial: the naive loop's numbers and ranks."""
    for module, values in exact.items():
        assert plan.scores[module].trials[0] == pytest.approx(values[0], rel=1e-5)
    ranks = ada.allocate_ranks({m: v[0] for m, v in exact.items()}, 8, sizes=plan.sizes)
    assert predict(1).ranks == ranks
    return {"checked": "first trial of every module within 1e-5 of the naive loop, ranks equal"}


def check_bfloat16(model, batch, plan, exact, predict) -> dict[str, Any]:
    """At least 95% of the modules within one rank of the float32 plan."""
    full = ada.predict_ranks(model, [batch], 8, trials=5, progress=False)
    far = {
        m: (full.ranks[m], plan.ranks[m])
        for m in full.ranks
        if abs(full.ranks[m] - plan.ranks[m]) > 1
    }
    assert len(far) <= 0.05 * len(full.ranks), far
    equal = sum(full.ranks[m] == plan.ranks[m] for m in full.ranks)
    return {"same_rank_as_float32": equal, "further_than_one_rank": far}


def probe_flops(targets, blocks, tokens) -> int:
    """Of one probe of each target: the products of its suffix, 2 FLOP a weight and token."""
    weights = [sum(p.numel() for p in block.parameters() if p.dim() == 2) for block in blocks]
    return 2 * tokens * sum(sum(weights[int(t.block.rsplit(".", 1)[-1]) :]) for t in targets)


def test_smollm2_float32(benchmark, capsys, monkeypatch):
    small, few = language_model(128, 64)
    targets = ada.find_targets(small, "all-linear")
    modules = {target.name: target.path for target in targets}

    def logits(outputs, batch):
        return outputs.logits

    exact = naive_disagreements(
        small, [few], modules, logits, 1, mask="attention_mask", metric="tv"
    )
    options = dict(target_modules="all-linear", metric="tv", trials=1, progress=False)
    plan = ada.predict_ranks(small, [few], 8, **options)
    for module, values in exact.items():
        assert plan.scores[module].trials[0] == pytest.approx(values[0], rel=1e-5)
    means = {module: values[0] for module, values in exact.items()}
    assert plan.ranks == ada.allocate_ranks(means, 8, sizes=plan.sizes)

    model, batch = language_model(2048, 256)
    blocks = list(model.model.layers)
    floors: list[float] = []

    def floor_round() -> None:
        seconds = block_seconds(model, blocks, batch)
        suffixes = sum(sum(seconds[int(t.block.rsplit(".", 1)[-1]) :]) for t in targets)
        floors.append(suffixes + len(targets) * head_seconds(model, 2048))

    floor_round(), floors.clear()
    with noise_clock(monkeypatch) as noise, peak_bytes() as peak:
        benchmark.pedantic(
            lambda: ada.predict_ranks(model, [batch], 8, **options), setup=floor_round, rounds=1
        )
    floor_round()
    ours = list(benchmark.stats.stats.data)
    with peak_bytes() as ordinary, torch.no_grad():
        model(**batch)
    naive = len(modules) * naive_seconds(model, batch, modules, logits, "tv")
    head = model.get_output_embeddings().weight.numel()
    flops = probe_flops(targets, blocks, 2048) + 2 * 2048 * head * len(targets)
    report(
        benchmark, capsys, "smollm2-float32", ours, floors, naive,
        gemm_floor=flops / gemm_rate(torch.float32),
        noise_share=noise[0] / ours[0],
        peak_over_ordinary_forward=peak[0] / ordinary[0],
        modules=len(modules), trials=1, items=8, tokens=2048, padded_tokens=2048,
        checked="128 tokens, every module within 1e-5 of the naive loop, ranks equal",
    )  # fmt: skip


def test_adaptive_trials(capsys):
    """How many trials adaptive sampling saves against as many for every module."""
    model, batch = encoder(minilm)
    plan = ada.predict_ranks(model, [batch], 32, trials=ada.AdaptiveTrials(2, 40), progress=False)
    counts = [len(score.trials) for score in plan.scores.values()]
    row = {
        "average_rank": 32,
        "trials": sum(counts),
        "trials_if_all_had_as_many": len(counts) * max(counts),
        "saved_ratio": len(counts) * max(counts) / sum(counts),
        "fewest": min(counts),
        "most": max(counts),
    }
    write_results("prediction", "minilm-adaptive", row)
    with capsys.disabled():
        print(f"\nadaptive trials on MiniLM: {row}")


def report(benchmark, capsys, name, ours, floors, naive, **row) -> None:
    floors = [(before + after) / 2 for before, after in pairwise(floors)]
    floor = statistics.median(floors)
    ratios = [a / b for a, b in zip(ours, floors, strict=True)]
    row = {
        "seconds": ours,
        "floor_seconds": floors,
        "over_floor": statistics.median(ratios),
        "naive_seconds_extrapolated": naive,
        "naive_sample": SAMPLE,
        "naive_over_ours": naive / statistics.median(ours),
        "rounds": len(ours),
        **row,
    }
    benchmark.extra_info.update(row)
    write_results("prediction", name, row)
    with capsys.disabled():
        print(
            f"\n{name}: {statistics.median(ours):.1f} s, {row['over_floor']:.2f} of the floor "
            f"({floor:.1f} s; GEMM alone {row['gemm_floor']:.1f} s), naive loop {naive:.0f} s "
            f"(extrapolated): {row['naive_over_ours']:.2f}x; noise {row['noise_share']:.1%}; peak "
            f"memory {row['peak_over_ordinary_forward']:.2f} of one forward's"
        )
