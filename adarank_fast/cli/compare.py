"""The command `adarank compare`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from adarank_fast.cli import options
from adarank_fast.cli.console import quiet_transformers, show_report
from adarank_fast.comparison.compare import compare as run
from adarank_fast.comparison.design import Design
from adarank_fast.comparison.folder import COMPARISON
from adarank_fast.files import check_own_folder
from adarank_fast.options import DEFAULT_TARGETS
from adarank_fast.training.data import check_alike, read_data


@options.flat(Design)
def compare(
    model: options.MODEL,
    data: options.DATA,
    design: Design,
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out texts.", show_default="a fifth of --data")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Plan file to add as an arm; without --arms, it is compared with uniform."
        ),
    ] = None,
    output_folder: Annotated[
        Path,
        typer.Option(
            "--output-folder",
            "-o",
            help="Folder of the report. Finished runs are kept there and not run again.",
        ),
    ] = Path("report"),
    target_modules: options.TARGET_MODULES = DEFAULT_TARGETS,
    text_column: options.TEXT_COLUMN = None,
    label_column: options.LABEL_COLUMN = None,
    as_json: options.JSON = False,
) -> None:
    """Train rank allocators under one parameter budget, with several seeds, and compare them."""
    if plan is not None:
        design = replace(design, arms=[str(plan), *(design.arms or ["uniform"])])
    read = [model, str(data), *design.plan_files]
    if eval_data is not None:
        read.append(str(eval_data))
    check_own_folder(output_folder, COMPARISON, read)
    held_out = None
    rows = read_data(data, text_column=text_column, label_column=label_column, task=design.task)
    print(rows.understood, file=sys.stderr)
    if eval_data is not None:
        held_out = read_data(
            eval_data, text_column=text_column, label_column=label_column, task=rows.task
        )
        check_alike(rows, held_out)
        print(held_out.understood, file=sys.stderr)
    quiet_transformers()
    report = run(
        model,
        rows,
        held_out,
        design=design,
        target_modules=options.parse_target_modules(target_modules),
        title=f"{Path(model).name} on {data.stem}",
        work_dir=output_folder,
        progress=not as_json,
    )
    report.save(output_folder)
    show_report(report, output_folder, as_json, rows.understood.as_json())
