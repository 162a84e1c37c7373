"""The command `adarank demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adarank_fast.cli.console import quiet_transformers, show_report
from adarank_fast.cli.options import JSON


def demo(
    report_dir: Annotated[
        Path, typer.Option(help="Folder for report.md, pictures and numbers.")
    ] = Path("report"),
    average_rank: Annotated[int, typer.Option(min=1, help="Rank of uniform LoRA.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training questions.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Training runs of each arm, a seed each.")] = 3,
    items: Annotated[
        int, typer.Option(min=1, help="Train on this many of the 4,376 questions.")
    ] = 2000,
    as_json: JSON = False,
) -> None:
    """Compare mixed ranks with uniform LoRA: MiniLM on TREC, some minutes on a CPU."""
    from adarank_fast.demo.demo import run_demo

    quiet_transformers()
    report = run_demo(report_dir, average_rank, epochs, seeds, items, quiet=as_json)
    show_report(report, report_dir, as_json)
