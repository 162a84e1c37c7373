"""The commands `adarank train` and `adarank compare`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from adarank_fast.comparison.report import Comparison

MODEL = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, or a name on the hub.", show_default=False),
]


TEXTS = "Texts, with labels for classification: .jsonl, .csv, .tsv or .txt."


DATA = Annotated[Path, typer.Option(help=TEXTS, show_default=False)]


TASK = Annotated[str, typer.Option(help="auto (by the labels), classification or causal-lm.")]


EPOCHS = Annotated[int, typer.Option(min=1, help="Passes over the training data.")]


MAX_STEPS = Annotated[int | None, typer.Option(min=1, help="Stop after this many steps.")]


BATCH_SIZE = Annotated[int, typer.Option(min=1, help="Items a step.")]


MAX_LENGTH = Annotated[int, typer.Option(min=1, help="Tokens of a text, or of a block.")]


SCALING = Annotated[str, typer.Option(help="constant (2 * rank), paper, rslora, or a number.")]


DTYPE = Annotated[str, typer.Option(help="Of the frozen weights: float32, bfloat16, float16.")]


TEXT_COLUMN = Annotated[str | None, typer.Option(help="Guessed if left out.")]


LABEL_COLUMN = Annotated[str | None, typer.Option(help="Guessed if left out.")]


JSON = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")]


def train(
    model: MODEL,
    data: DATA,
    plan: Annotated[Path, typer.Option(help="The ranks: a plan.json.", show_default=False)],
    output_folder: Annotated[
        Path, typer.Option("--output-folder", "-o", help="Where to put the adapter.")
    ] = Path("adapter"),
    task: TASK = "auto",
    epochs: EPOCHS = 3,
    max_steps: MAX_STEPS = None,
    batch_size: BATCH_SIZE = 32,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="At its highest.")] = 1e-3,
    max_length: MAX_LENGTH = 128,
    scaling: SCALING = "constant",
    seed: Annotated[int, typer.Option(min=0, help="Of head, adapters, order, dropout.")] = 0,
    dtype: DTYPE = "float32",
    four_bit: Annotated[
        bool, typer.Option("--four-bit", help="Keep the frozen weights in 4 bits (bitsandbytes).")
    ] = False,
    text_column: TEXT_COLUMN = None,
    label_column: LABEL_COLUMN = None,
    as_json: JSON = False,
) -> None:
    """Train a plan's adapters on MODEL; the same command goes on with a run that was cut off."""
    from tqdm import tqdm

    from adarank_fast.adapters.inject import inject
    from adarank_fast.models.identity import digest_data
    from adarank_fast.plan.rank_plan import RankPlan
    from adarank_fast.training import loading
    from adarank_fast.training.data import read_texts
    from adarank_fast.training.loading import settle_task
    from adarank_fast.training.tokens import collate, encode, make_classes, pad_id
    from adarank_fast.training.trainer import Recipe, check_folder, train_adapter

    loading.check_choice("--dtype", dtype, loading.DTYPES)
    check_folder(output_folder)
    recipe = Recipe(epochs, batch_size, learning_rate, seed, max_steps)
    ranks = RankPlan.load(plan)
    texts = read_texts(data, text_column, label_column)
    task = settle_task(task, texts)
    classes = make_classes(texts) if task == "classification" else []
    _quiet()
    from transformers import set_seed

    tokenizer = loading.load_tokenizer(model)
    items = encode(tokenizer, texts, classes, max_length)
    set_seed(seed)
    network, lora_config = loading.load_model(
        model, task, classes, tokenizer=tokenizer, dtype=dtype, four_bit=four_bit
    )
    # with an example the layers are fused from the first step on: a resumed run rounds alike
    example = collate([{k: v for k, v in items[0].items() if k != "labels"}], pad_id(tokenizer))
    example = {key: value.to(next(network.parameters()).device) for key, value in example.items()}
    peft_model = inject(network, ranks, _scaling(scaling), example, **lora_config)
    description = {
        "model": model,
        "task": task,
        "data": digest_data(items),
        "ranks": ranks.ranks,
        "scaling": scaling,
        "dtype": dtype,
        "four_bit": four_bit,
    }
    steps = recipe.steps(len(items))
    with tqdm(total=steps, disable=not sys.stderr.isatty(), leave=False) as bar:
        training = train_adapter(
            peft_model, items, pad_id(tokenizer), recipe, output_folder, description, bar.update
        )
    if as_json:
        numbers = {"parameters": ranks.parameters, "steps": steps, "curve": training.curve()}
        print(json.dumps({"adapter": str(output_folder), **numbers}))
        return
    last = f", training loss {training.curve()[-1][1]:.4g} at the end" if training.losses else ""
    print(f"{steps:,} steps{last}, {ranks.parameters:,} adapter parameters")
    print(f"wrote {output_folder}", file=sys.stderr)


def compare(
    model: MODEL,
    data: DATA,
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out texts.", show_default="a fifth of --data")
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="adarank, uniform, random, reversed, eva or plan files, separated by commas.",
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
    target_modules: Annotated[
        str, typer.Option(help='"attention", "all-linear", names by commas, or a regex.')
    ] = "attention",
    task: TASK = "auto",
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
    epochs: EPOCHS = 3,
    max_steps: MAX_STEPS = None,
    batch_size: BATCH_SIZE = 32,
    max_length: MAX_LENGTH = 128,
    scaling: SCALING = "constant",
    dtype: DTYPE = "float32",
    text_column: TEXT_COLUMN = None,
    label_column: LABEL_COLUMN = None,
    as_json: JSON = False,
) -> None:
    """Train rank allocators under one parameter budget, with several seeds, and compare them."""
    from adarank_fast.cli.main import parse_target_modules
    from adarank_fast.comparison.compare import compare as run
    from adarank_fast.training.data import read_texts

    chosen = [arm.strip() for arm in (arms or "").split(",") if arm.strip()]
    if plan is not None:
        chosen = [str(plan), *(chosen or ["uniform"])]
    texts = read_texts(data, text_column, label_column)
    held_out = None if eval_data is None else read_texts(eval_data, text_column, label_column)
    _quiet()
    report = run(
        model,
        texts,
        held_out,
        chosen or ("adarank", "uniform"),
        seeds,
        average_rank=average_rank,
        target_modules=parse_target_modules(target_modules),
        task=task,
        metric=None if metric is None else _function(metric),
        greater_is_better=not smaller_is_better,
        learning_rates=None if learning_rates is None else _numbers(learning_rates),
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        max_length=max_length,
        scaling=_scaling(scaling),
        dtype=dtype,
        title=f"{Path(model).name} on {data.stem}",
        work_dir=output_folder,
        progress=not as_json,
    )
    report.save(output_folder)
    show_report(report, output_folder, as_json)


def show_report(report: Comparison, folder: Path, as_json: bool) -> None:
    """The tables and what they say on stdout, or the results as JSON."""
    from adarank_fast.cli.main import show
    from adarank_fast.comparison.findings import reading
    from adarank_fast.comparison.report import rich_tables

    if as_json:
        print(json.dumps(report.results))
        return
    for table in rich_tables(report.results):
        show(table)
    for line in reading(report.results):
        show(line)
    print(f"wrote {folder / 'report.html'}", file=sys.stderr)


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _scaling(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--learning-rates {text!r}: give numbers separated by commas, such as 1e-3,2e-3"
        ) from None


def _function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; modules of the working folder are found too."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--metric {name!r}: {error}; give module:function") from error
    finally:
        sys.path.remove("")
