"""The command `adarank train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from adarank_fast.cli import options
from adarank_fast.cli.console import quiet_transformers, say_written
from adarank_fast.options import DTYPES, check_choice
from adarank_fast.training.data import read_texts


def train(
    model: options.MODEL,
    data: options.DATA,
    plan: Annotated[Path, typer.Option(help="The ranks: a plan.json.", show_default=False)],
    output_folder: Annotated[
        Path, typer.Option("--output-folder", "-o", help="Where to put the adapter.")
    ] = Path("adapter"),
    task: options.TASK = "auto",
    epochs: options.EPOCHS = 3,
    max_steps: options.MAX_STEPS = None,
    batch_size: options.BATCH_SIZE = 32,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="At its highest.")] = 1e-3,
    max_length: options.MAX_LENGTH = 128,
    scaling: options.SCALING = "constant",
    seed: Annotated[int, typer.Option(min=0, help="Of head, adapters, order, dropout.")] = 0,
    dtype: options.DTYPE = "float32",
    four_bit: Annotated[
        bool, typer.Option("--four-bit", help="Keep the frozen weights in 4 bits (bitsandbytes).")
    ] = False,
    text_column: options.TEXT_COLUMN = None,
    label_column: options.LABEL_COLUMN = None,
    as_json: options.JSON = False,
) -> None:
    """Train a plan's adapters on MODEL; the same command goes on with a run that was cut off."""
    check_choice("--dtype", dtype, DTYPES)
    from tqdm import tqdm
    from transformers import set_seed

    from adarank_fast.adapters.inject import inject
    from adarank_fast.models.identity import digest_data
    from adarank_fast.plan.lora_config import alpha_rule
    from adarank_fast.plan.rank_plan import RankPlan
    from adarank_fast.training.loading import choose_task, load_model, load_tokenizer
    from adarank_fast.training.tokens import collate, encode, make_classes, pad_id
    from adarank_fast.training.trainer import Recipe, check_adapter_folder, train_adapter

    check_adapter_folder(output_folder)
    scale = options.parse_scaling(scaling)
    alpha_rule(scale)  # refuses what is no scaling
    recipe = Recipe(epochs, batch_size, learning_rate, seed, max_steps)
    ranks = RankPlan.load(plan)
    texts = read_texts(data, text_column, label_column)
    task = choose_task(task, texts)
    classes = make_classes(texts) if task == "classification" else []
    quiet_transformers()
    tokenizer = load_tokenizer(model)
    items = encode(tokenizer, texts, classes, max_length)
    set_seed(seed)
    network, lora_config = load_model(
        model, task, classes, tokenizer=tokenizer, dtype=dtype, four_bit=four_bit
    )
    # with an example the layers are fused from the first step on: a resumed run rounds alike
    example = collate([{k: v for k, v in items[0].items() if k != "labels"}], pad_id(tokenizer))
    example = {key: value.to(next(network.parameters()).device) for key, value in example.items()}
    peft_model = inject(network, ranks, scale, example, **lora_config)
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
    say_written(output_folder)
