"""The command `adarank merge`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from adarank_fast.cli.console import quiet_transformers, say_written, typed
from adarank_fast.cli.options import JSON, MODEL
from adarank_fast.files import check_folder
from adarank_fast.options import DTYPES, check_choice


def merge(
    model: MODEL,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="An adapter folder.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="New folder for the model.", show_default=False),
    ],
    dtype: Annotated[
        str,
        typer.Option(help="Type of the merged weights: auto (as in MODEL), float32, bfloat16, ..."),
    ] = "auto",
    as_json: JSON = False,
) -> None:
    """Add an adapter to MODEL's weights and save a plain model folder with its tokenizer."""
    check_choice("--dtype", dtype, ("auto", *DTYPES))
    check_folder(output)
    from adarank_fast.adapters.merge import merge_adapter

    quiet_transformers()
    fresh = sorted(merge_adapter(model, adapter, output, dtype))
    if fresh:
        print(
            f"note: neither MODEL nor the adapter has weights for {', '.join(fresh[:4])}"
            f"{' ...' if len(fresh) > 4 else ''}; they are random",
            file=sys.stderr,
        )
    then = typed("adarank", "evaluate", output, "--data", "FILE")
    say_written(output, then, {"merge": str(output)} if as_json else None)
