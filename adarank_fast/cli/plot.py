"""The command `adarank plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adarank_fast.cli.console import say_written, typed
from adarank_fast.cli.options import JSON
from adarank_fast.files import check_file


def plot(
    plan_file: Annotated[
        Path, typer.Argument(metavar="PLAN", help="A plan.json.", show_default=False)
    ],
    output_file: Annotated[
        Path, typer.Option("--output-file", "-o", help="Picture to write: .png, .pdf or .svg.")
    ] = Path("plan.png"),
    as_json: JSON = False,
) -> None:
    """Draw a plan: disagreement by layer, and the ranks as a heat map."""
    check_file(output_file, [plan_file])
    from adarank_fast.plan.rank_plan import RankPlan
    from adarank_fast.plots.plans import plot_plan

    plot_plan(RankPlan.load(plan_file), output_file)
    say_written(
        output_file,
        typed("adarank", "train", "MODEL", "--data", "FILE", "--plan", plan_file),
        {"plot": str(output_file)} if as_json else None,
    )
