"""The command `adarank bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from adarank_fast.cli import options
from adarank_fast.cli.console import quiet_transformers, say_next, say_written, status, typed
from adarank_fast.cli.options import parse_target_modules
from adarank_fast.errors import AdarankError
from adarank_fast.options import DTYPES, check_choice


def bench(
    model: options.MODEL,
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan file to time; default: uniform LoRA.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of uniform LoRA; default: 8.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Texts to run on; default: random tokens.", show_default=False),
    ] = None,
    output_folder: Annotated[
        Path | None,
        typer.Option(
            "--output-folder",
            "-o",
            help="Folder for the table, a picture and JSON; default: none is written.",
            show_default=False,
        ),
    ] = None,
    target_modules: options.TARGET_MODULES = "all-linear",
    batch_size: options.BATCH_SIZE = 4,
    max_length: options.MAX_LENGTH = 128,
    max_seconds: Annotated[
        float,
        typer.Option(help="Approximate time limit; tokens and repetitions are reduced to fit."),
    ] = 90.0,
    compile: Annotated[
        bool, typer.Option("--compile", help="Also time blocks compiled by torch.compile.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"Load weights as {', '.join(DTYPES)} or auto.")
    ] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: options.JSON = False,
) -> None:
    """Time training steps of MODEL here: frozen, with PEFT, and with adarank-fast."""
    check_choice("--dtype", dtype, (*DTYPES, "auto"))
    if plan is not None and rank is not None:
        raise AdarankError("--plan and --rank are both given; a plan has its own ranks")
    if output_folder is not None and output_folder.is_file():
        raise AdarankError(f"--output-folder {str(output_folder)!r} is a file; name a folder")
    from adarank_fast.benchmarking.benchmark import benchmark

    quiet_transformers()
    with status(f"benchmarking {model}, about {max_seconds:.0f} s"):
        report = benchmark(
            *(model, plan, rank or 8, data),
            target_modules=parse_target_modules(target_modules),
            batch_size=batch_size,
            max_length=max_length,
            max_seconds=max_seconds,
            compile=compile,
            device=device,
            dtype=dtype,
            threads=threads,
        )
    if output_folder is not None:
        report.save(output_folder)
    if as_json:
        print(json.dumps(report.results))
    else:
        print(report.table())
        then = typed("adarank", "predict", model, "--data", data or "FILE")
        if plan is not None:
            then = typed("adarank", "train", model, "--data", data or "FILE", "--plan", plan)
        if output_folder is None:
            say_next(then)
        else:
            say_written(output_folder, then)
