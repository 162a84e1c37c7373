"""The command `adarank apply`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from adarank_fast.cli import options
from adarank_fast.cli.console import quiet_transformers, say_written, typed
from adarank_fast.cli.evaluate import ADAPTER, LENGTH
from adarank_fast.files import check_file, replacing
from adarank_fast.options import DTYPES, check_choice


def apply(
    model: options.MODEL,
    data: options.DATA,
    adapter: ADAPTER = None,
    output_file: Annotated[
        Path, typer.Option("--output-file", "-o", help="File to write, one JSON object per line.")
    ] = Path("predictions.jsonl"),
    text_column: options.TEXT_COLUMN = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch.")] = 32,
    max_length: LENGTH = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Generate at most this many tokens per prompt.")
    ] = 64,
    dtype: options.DTYPE = "float32",
    four_bit: Annotated[
        bool, typer.Option("--four-bit", help="Load MODEL in 4 bits (bitsandbytes).")
    ] = False,
    as_json: options.JSON = False,
) -> None:
    """Write each text's class and probability, or a language model's answers, in order."""
    check_choice("--dtype", dtype, DTYPES)
    check_file(output_file, inputs=[data, *([adapter] if adapter else [])])
    from tqdm import tqdm

    from adarank_fast.training.data import read_data
    from adarank_fast.training.trained import apply as use
    from adarank_fast.training.trained import load_trained, task_of

    quiet_transformers()
    task = task_of(model, adapter)  # refuses what is neither a classifier nor a language model
    found = read_data(data, text_column=text_column, task=task, answers=False)
    print(found.understood, file=sys.stderr)
    rows = found.rows
    trained = load_trained(model, adapter, dtype, four_bit, max_length=max_length)
    with replacing(output_file) as temporary, open(temporary, "w", encoding="utf-8") as file:
        answers = use(trained, rows, batch_size, max_new_tokens)
        quiet = not sys.stderr.isatty()
        for answer in tqdm(answers, total=len(rows), disable=quiet, leave=False):
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
    numbers = {"predictions": str(output_file), "count": len(rows)}
    more = {"understood": found.understood.as_json()}
    then = "read it line by line: each is a JSON object, in the order of the data"
    if adapter is not None and not four_bit:
        then = typed("adarank", "merge", model, adapter, "-o", "merged")
    say_written(output_file, then, {**numbers, **more} if as_json else None)
