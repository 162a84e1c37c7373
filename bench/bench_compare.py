"""What `adarank compare` adds to its training runs, and how long the default comparison takes.

    python -m bench.bench_compare               (or `make bench-compare`): about 20 minutes
    python -m bench.bench_compare --items 200   a trial on fewer questions; writes nothing

MiniLM on TREC with 50 classes, adarank and uniform, three seeds, everything else by default, in a
new folder, report included. Results go to bench/results/compare.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import adarank_fast as ada
from adarank_fast.demo.assets import minilm, trec
from bench.results_file import write_results


def measure(*arguments: Any, **options: Any) -> dict[str, float]:
    """Seconds of `ada.compare` and its report by the clock, and of their parts.

    Returns:
        "seconds" of everything; "run_seconds" of the runs: a model made, trained and evaluated;
        "training_seconds" of their training steps alone; "prediction_seconds" of AdaRank's plan.
        "added" is what is not runs, as a share of them, "added_to_steps" what is not training
        steps, as a share of these.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        report = ada.compare(*arguments, work_dir=folder, **options)
        report.save(folder)
        seconds = time.perf_counter() - started
    runs, steps = (report.results[f"{part}_seconds"] for part in ("cell", "training"))
    return {
        "seconds": seconds,
        "run_seconds": runs,
        "training_seconds": steps,
        "prediction_seconds": report.results["arms"]["adarank"]["prediction_seconds"],
        "added": seconds / runs - 1,
        "added_to_steps": seconds / steps - 1,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Times the default comparison.")
    parser.add_argument("--items", type=int, help="train and evaluate on so many only")
    items = parser.parse_args().items
    train, held_out = trec(fine=True)
    train = train[:items]
    labels = {label for _, label in train}  # a comparison refuses others
    held_out = [row for row in held_out if row[1] in labels][:items]
    found = measure(minilm(), train, held_out)
    print(found)
    if items is None:
        write_results("compare", {"MiniLM, TREC with 50 classes": found})
