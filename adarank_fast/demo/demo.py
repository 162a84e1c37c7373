"""`adarank demo`: compare mixed ranks with uniform LoRA, MiniLM on TREC, in minutes."""

from __future__ import annotations

import os

from adarank_fast.comparison.compare import compare
from adarank_fast.comparison.folder import COMPARISON
from adarank_fast.comparison.report import Comparison
from adarank_fast.demo import assets
from adarank_fast.files import check_own_folder

LEARNING_RATES = (0.004, 0.008)  # two, so that the demo stays short


def run_demo(
    report_dir: str | os.PathLike[str] = "report",
    average_rank: int = 2,
    epochs: int = 2,
    seeds: int = 3,
    items: int | None = 2000,
    quiet: bool = False,
) -> Comparison:
    """Predict, train both arms, write the report; see `compare`.

    Args:
        report_dir: made if need be. Runs that an earlier demo finished there are not run again.
        average_rank: of uniform LoRA, whose parameters the other arm may spend.
        epochs: of each run.
        seeds: runs of each arm.
        items: train on this many of the 4,376 questions; None: all.
        quiet: no progress on stderr.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    check_own_folder(report_dir, COMPARISON)
    train, held_out = assets.trec(fine=True)
    report = compare(
        assets.minilm(),
        train[:items],
        held_out,
        seeds=seeds,
        average_rank=average_rank,
        epochs=epochs,
        max_length=64,
        learning_rates=LEARNING_RATES,
        title="all-MiniLM-L6-v2 on TREC: mixed ranks beside uniform LoRA",
        work_dir=report_dir,
        progress=not quiet,
    )
    report.save(report_dir)
    return report
