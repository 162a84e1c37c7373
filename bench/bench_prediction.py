"""Prediction against the naive loop: MPNet-base, 9 padded sentences, 5 trials, in one process.

    python -m pytest bench/bench_prediction.py

Rounds alternate between the two, so that a drift of the machine's speed hits both. The result is
checked before any time is reported, and written to bench/results/prediction.json.
"""

from __future__ import annotations

import statistics
import time

import pytest
from transformers import AutoModel, AutoTokenizer

import adarank_fast as ada
from adarank_fast.assets import minilm, mpnet
from adarank_fast.outputs import mean_pool
from bench.naive import naive_disagreements
from bench.results_file import write_results

SENTENCES = [
    "Who wrote the novel War and Peace?",
    "What is the capital of Burkina Faso?",
    "How far is the moon?",
    "Which year did the Titanic sink on its first voyage across the Atlantic Ocean?",
    "What does NASA stand for?",
    "Name the largest river by volume of water and the countries that it flows through on its way "
    "to the sea.",
    "When was the printing press invented?",
    "What is a group of lions called?",
    "How many bones does an adult human being have in both of the hands and both of the feet?",
]
TRIALS = 5


def pooled(outputs, batch):
    return mean_pool(outputs.last_hidden_state, batch["attention_mask"])


@pytest.mark.parametrize(
    ("name", "folder", "rounds"), [("MiniLM", minilm, 5), ("MPNet-base", mpnet, 3)]
)
def test_prediction(benchmark, capsys, name, folder, rounds):
    model = AutoModel.from_pretrained(folder())
    tokenizer = AutoTokenizer.from_pretrained(folder())
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    modules = {t.name: t.path for t in ada.find_targets(model, "attention")}
    model.eval()
    naive_seconds: list[float] = []
    naive: dict[str, list[float]] = {}

    def ours() -> ada.RankPlan:
        return ada.predict_ranks(model, [batch], 8, trials=TRIALS, progress=False)

    def naive_round() -> None:
        start = time.perf_counter()
        naive.update(naive_disagreements(model, [batch], modules, pooled, TRIALS))
        naive_seconds.append(time.perf_counter() - start)

    plan = ours()  # a warm-up of both
    naive_disagreements(model, [batch], dict(list(modules.items())[:2]), pooled, 1)
    benchmark.pedantic(ours, setup=naive_round, rounds=rounds)
    for module, values in naive.items():
        assert plan.scores[module].trials == pytest.approx(values, rel=1e-5)
    means = {module: statistics.fmean(values) for module, values in naive.items()}
    assert plan.ranks == ada.allocate_ranks(means, 8, sizes=plan.sizes)

    ours_seconds = list(benchmark.stats.stats.data)
    ratios = [slow / fast for slow, fast in zip(naive_seconds, ours_seconds, strict=True)]
    row = {
        "model": name,
        "items": len(SENTENCES),
        "padded_tokens": batch["input_ids"].numel(),
        "tokens": int(batch["attention_mask"].sum()),
        "trials": TRIALS,
        "modules": len(modules),
        "rounds": rounds,
        "naive_seconds": naive_seconds,
        "adarank_fast_seconds": ours_seconds,
        "naive_over_adarank_fast": statistics.median(ratios),
    }
    benchmark.extra_info.update(row)
    write_results("prediction", name, row)
    with capsys.disabled():
        print(
            f"\n{name}: naive {statistics.median(naive_seconds):.1f} s, adarank-fast "
            f"{statistics.median(ours_seconds):.1f} s, ratio {row['naive_over_adarank_fast']:.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}, {rounds} interleaved rounds)"
        )
