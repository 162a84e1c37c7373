"""The command `adarank compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adarank_fast.cli import options
from adarank_fast.cli.console import quiet_transformers, show_report
from adarank_fast.options import load_function
from adarank_fast.training.data import read_texts


def compare(
    model: options.MODEL,
    data: options.DATA,
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out texts.", show_default="a fifth of --data")
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="adarank, uniform, random, reversed, eva, plan files or module:function, "
            "separated by commas.",
            show_default="adarank,uniform",
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Short for --arms PLAN,uniform, or one arm more.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training runs of each arm.")] = 3,
    output_folder: Annotated[
        Path,
        typer.Option("--output-folder", "-o", help="Report; finished runs are kept there."),
    ] = Path("report"),
    average_rank: Annotated[
        int, typer.Option(min=1, help="Of uniform LoRA, whose parameters every arm may spend.")
    ] = 8,
    target_modules: options.TARGET_MODULES = "attention",
    task: options.TASK = "auto",
    metric: Annotated[
        str | None,
        typer.Option(
            help="module:function of predictions and labels.", show_default="accuracy, perplexity"
        ),
    ] = None,
    smaller_is_better: Annotated[
        bool, typer.Option("--smaller-is-better", help="Of your --metric.")
    ] = False,
    learning_rates: Annotated[
        str | None,
        typer.Option(help="Tried for each arm, separated by commas.", show_default="by the task"),
    ] = None,
    epochs: options.EPOCHS = 3,
    max_steps: options.MAX_STEPS = None,
    batch_size: options.BATCH_SIZE = 32,
    max_length: options.MAX_LENGTH = 128,
    scaling: options.SCALING = "constant",
    dtype: options.DTYPE = "float32",
    text_column: options.TEXT_COLUMN = None,
    label_column: options.LABEL_COLUMN = None,
    as_json: options.JSON = False,
) -> None:
    """Train rank allocators under one parameter budget, with several seeds, and compare them."""
    from adarank_fast.comparison.compare import compare as run

    chosen = [arm.strip() for arm in (arms or "").split(",") if arm.strip()]
    if plan is not None:
        chosen = [str(plan), *(chosen or ["uniform"])]
    rates = None
    if learning_rates is not None:
        rates = options.parse_numbers("--learning-rates", learning_rates)
    texts = read_texts(data, text_column, label_column)
    held_out = None if eval_data is None else read_texts(eval_data, text_column, label_column)
    quiet_transformers()
    report = run(
        model,
        texts,
        held_out,
        chosen or ("adarank", "uniform"),
        seeds,
        average_rank=average_rank,
        target_modules=options.parse_target_modules(target_modules),
        task=task,
        metric=None if metric is None else load_function("--metric", metric),
        greater_is_better=not smaller_is_better,
        learning_rates=rates,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        max_length=max_length,
        scaling=options.parse_scaling(scaling),
        dtype=dtype,
        title=f"{Path(model).name} on {data.stem}",
        work_dir=output_folder,
        progress=not as_json,
    )
    report.save(output_folder)
    show_report(report, output_folder, as_json)
