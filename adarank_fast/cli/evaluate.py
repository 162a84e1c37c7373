"""The command `adarank evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from adarank_fast.cli import options
from adarank_fast.cli.console import quiet_transformers, say_next, show, typed
from adarank_fast.options import DTYPES, check_choice

ADAPTER = Annotated[
    Path | None,
    typer.Argument(
        metavar="[ADAPTER]",
        help="Folder of the adapter; leave it out for a merged model.",
        show_default=False,
    ),
]
LENGTH = Annotated[
    int | None,
    typer.Option(
        min=1, help="Use at most this many tokens of an example; default: as in training."
    ),
]


def evaluate(
    model: options.MODEL,
    data: options.DATA,
    adapter: ADAPTER = None,
    text_column: options.TEXT_COLUMN = None,
    label_column: options.LABEL_COLUMN = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch.")] = 32,
    max_length: LENGTH = None,
    dtype: options.DTYPE = "float32",
    four_bit: Annotated[
        bool, typer.Option("--four-bit", help="Load MODEL in 4 bits (bitsandbytes).")
    ] = False,
    as_json: options.JSON = False,
) -> None:
    """Measure accuracy and macro F1 of a classifier, or perplexity of a language model."""
    check_choice("--dtype", dtype, DTYPES)
    from rich import box
    from rich.table import Table

    from adarank_fast.training.data import read_data
    from adarank_fast.training.trained import evaluate as measure
    from adarank_fast.training.trained import task_of

    quiet_transformers()
    rows = read_data(
        data, text_column=text_column, label_column=label_column, task=task_of(model, adapter)
    )
    print(rows.understood, file=sys.stderr)
    found = measure(
        *(model, rows, adapter),
        batch_size=batch_size,
        max_length=max_length,
        dtype=dtype,
        four_bit=four_bit,
    )
    if as_json:
        print(json.dumps({**found, "understood": rows.understood.as_json()}))
        return
    table = Table(title=f"On {data.name}", box=box.SIMPLE_HEAD)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in found.items():
        table.add_row(name, f"{value:,}" if name in ("examples", "tokens") else f"{value:.4g}")
    show(table)
    names = [model] if adapter is None else [model, adapter]
    say_next(typed("adarank", "apply", *names, "--data", data, *["--four-bit"] * four_bit))
