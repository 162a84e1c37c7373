"""The command `adarank train`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict, cast

import typer
from rich import box
from rich.table import Table

from adarank_fast.cli import options
from adarank_fast.cli.console import quiet_transformers, say_written, show, status
from adarank_fast.errors import AdarankError
from adarank_fast.options import DTYPES, check_choice

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from adarank_fast.models.targets import TargetModules
    from adarank_fast.plan.rank_plan import RankPlan
    from adarank_fast.training.card import Result
    from adarank_fast.training.classification import Classification
    from adarank_fast.training.data import Data, Understood
    from adarank_fast.training.language_model import LanguageModel

AVERAGE_RANK = 8
CALIBRATION = 64  # examples that ranks are predicted on


def train(
    model: options.MODEL,
    data: options.DATA,
    plan: Annotated[
        Path | None, typer.Option(help="The ranks: a plan.json. Default: they are predicted first.")
    ] = None,
    average_rank: Annotated[
        float | None,
        typer.Option(min=0.0, help="Mean rank of the prediction.", show_default=str(AVERAGE_RANK)),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="No prediction: uniform LoRA of this rank.")
    ] = None,
    target_modules: options.TARGET_MODULES = "attention",
    output_folder: Annotated[
        Path, typer.Option("--output-folder", "-o", help="Where to put the adapter.")
    ] = Path("adapter"),
    eval_data: Annotated[
        Path | None, typer.Option(help="Data to measure on; default: some of the training data.")
    ] = None,
    task: options.TASK = "auto",
    text_column: options.TEXT_COLUMN = None,
    label_column: options.LABEL_COLUMN = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data (3).")] = None,
    max_steps: options.MAX_STEPS = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Examples in a step (32; language models 8).")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0.0, help="The highest learning rate (1e-3; language models 2e-4)."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an example (128; language models 1024).")
    ] = None,
    early_stopping: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many evaluations without gain; keep the best."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A .yaml or .json of TrainingArguments (language models: SFTConfig)."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="One field of these: name=value. May be given again."),
    ] = None,
    scaling: options.SCALING = "constant",
    lora_dropout: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Dropout in front of the adapters.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of new weights, order and dropout (0).")
    ] = None,
    dtype: options.DTYPE = "float32",
    four_bit: Annotated[
        bool, typer.Option("--four-bit", help="Keep the frozen weights in 4 bits (bitsandbytes).")
    ] = False,
    as_json: options.JSON = False,
) -> None:
    """Train adapters on MODEL; the same command goes on with a run that was cut off."""
    check_choice("--dtype", dtype, DTYPES)
    source = _ranks_from(plan, rank, average_rank)
    import torch
    from tqdm import tqdm
    from transformers import EarlyStoppingCallback, set_seed

    from adarank_fast.adapters.inject import inject
    from adarank_fast.models.identity import digest_weights
    from adarank_fast.plan.budget import Budget
    from adarank_fast.plan.lora_config import alpha_rule
    from adarank_fast.plan.rank_plan import RankPlan
    from adarank_fast.training.arguments import config_class, make_arguments, read_settings
    from adarank_fast.training.card import Result, write_beside
    from adarank_fast.training.data import check_alike, read_data
    from adarank_fast.training.loading import (
        check_task,
        has_other_head,
        load_model,
        load_tokenizer,
    )
    from adarank_fast.training.run import (
        PLAN,
        Progress,
        check_adapter_folder,
        finish,
        run,
        unfinished_run,
    )

    quiet_transformers()
    check_adapter_folder(output_folder)
    scale = options.parse_scaling(scaling)
    alpha_rule(scale)  # refuses what is no scaling
    if plan is not None:
        source = {"plan": RankPlan.load(plan)}
    elif rank is None:
        Budget(average_rank=source["average_rank"])  # refuses what is no rank
    source["target_modules"] = options.parse_target_modules(target_modules)
    read = partial(read_data, text_column=text_column, label_column=label_column)
    rows = read(data, task=task)
    print(rows.understood, file=sys.stderr)
    held_out = None
    if eval_data is not None:
        held_out = read(eval_data, task=rows.task)
        check_alike(rows, held_out)
        print(held_out.understood, file=sys.stderr)
    config_class(rows.task)  # without trl nothing need be loaded
    flags: dict[str, object] = {
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "seed": seed,
    }
    flags |= {"learning_rate": learning_rate, "max_length": max_length}
    fields = read_settings(rows.task, config, flags, settings or ())
    if early_stopping is not None:
        if eval_data is None:
            raise AdarankError("--early-stopping needs --eval-data to watch")
        fields = {"load_best_model_at_end": True, **fields}
    if fields.get("load_best_model_at_end"):  # Trainer's own default is to evaluate never
        fields = {"eval_strategy": "steps", "eval_steps": fields["save_steps"], **fields}
    make_arguments(rows.task, fields, output_folder)  # refuses what does not go together

    check_task(model, rows.task)
    set_seed(int(fields["seed"]))
    with status(f"loading {model}"):
        tokenizer = load_tokenizer(model)
        examples = _examples(rows, held_out, tokenizer, fields)
        network, lora_config = load_model(
            model, rows.task, rows.classes, tokenizer=tokenizer, dtype=dtype, four_bit=four_bit
        )
        if not four_bit and torch.cuda.is_available():
            cast("nn.Module", network).to("cuda")
    noted = {
        **{"model": model, "weights": digest_weights(network), "task": rows.task},
        **{"data": examples.digest(), "settings": fields},
        **{"ranks": _digestible(source), "scaling": scaling, "lora_dropout": lora_dropout},
        **{"dtype": dtype, "four_bit": four_bit, "early_stopping": early_stopping},
    }
    with unfinished_run(output_folder, noted) as checkpoints:
        chosen = _plan(source, network, examples, checkpoints)
        set_seed(int(fields["seed"]))
        (example,) = examples.calibration(1, network.device)  # fused from the first step on
        lora_config["lora_dropout"] = lora_dropout
        peft_model = inject(network, chosen, scale, example, **lora_config)
        with tqdm(disable=not sys.stderr.isatty(), leave=False) as bar:
            callbacks: list[TrainerCallback] = [Progress(bar)]
            if early_stopping is not None:
                callbacks.append(EarlyStoppingCallback(early_stopping))
            arguments = make_arguments(rows.task, fields, checkpoints)
            trainer = examples.trainer(peft_model, arguments, callbacks)
            training = run(trainer, checkpoints)
        with peft_model.disable_adapter():  # the base model, and the head as it was drawn
            before = examples.measure(trainer)
        result = Result(
            base_model=model,
            task=rows.task,
            form=rows.form,
            classes=rows.classes,
            data=[path.name for path in (data, eval_data) if path is not None],
            examples=len(rows.rows),
            ranks=chosen.ranks,
            parameters=chosen.parameters,
            settings=fields,
            steps=len(training.losses),
            measured_on=_measured_on(examples, eval_data),
            before=before,
            after=examples.measure(trainer),
            curve=training.curve(),
            other_head=has_other_head(model, rows.task, rows.classes),
        )

        def beside(folder: Path) -> None:
            chosen.save(folder / PLAN)
            write_beside(folder, result, network.config, tokenizer, output_folder)

        finish(output_folder, checkpoints, peft_model, beside)
    _say(result, output_folder, rows.understood if as_json else None)


class RankSource(TypedDict, total=False):
    """Where the ranks come from: one of the first three."""

    plan: RankPlan
    rank: int
    average_rank: float
    target_modules: TargetModules


def _examples(
    rows: Data,
    held_out: Data | None,
    tokenizer: PreTrainedTokenizerBase,
    fields: Mapping[str, object],
) -> Classification | LanguageModel:
    from adarank_fast.training.classification import Classification
    from adarank_fast.training.language_model import LanguageModel

    kind = Classification if rows.task == "classification" else LanguageModel
    return kind(rows, held_out, tokenizer, fields)


def _ranks_from(plan: Path | None, rank: int | None, average_rank: float | None) -> RankSource:
    given = {"plan": plan, "rank": rank, "average_rank": average_rank}
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in found)
        raise AdarankError(f"{names} each say the ranks; give one of them")
    if rank is not None:
        return {"rank": rank}
    if plan is not None:
        return {}
    return {"average_rank": AVERAGE_RANK if average_rank is None else average_rank}


def _digestible(source: RankSource) -> dict[str, object]:
    """Where the ranks come from, as a run that goes on compares it."""
    if "plan" in source:
        return {"plan": source["plan"].ranks}
    return dict(source)


def _plan(
    source: RankSource,
    network: PreTrainedModel,
    examples: Classification | LanguageModel,
    checkpoints: Path,
) -> RankPlan:
    """The given plan, a uniform one, or a prediction; a resumed run does not predict again."""
    from adarank_fast.plan.budget import Budget
    from adarank_fast.plan.rank_plan import RankPlan
    from adarank_fast.prediction.predict import predict_ranks
    from adarank_fast.training.run import PLAN

    if isinstance(given := source.get("plan"), RankPlan):
        return given
    if "rank" in source:
        return RankPlan.uniform(network, source["rank"], source["target_modules"])
    path = checkpoints / PLAN
    if not path.exists():
        batches = examples.calibration(CALIBRATION, network.device)
        budget = Budget(average_rank=source["average_rank"])
        targets, progress = source["target_modules"], sys.stderr.isatty()
        plan = predict_ranks(network, batches, budget, targets, progress=progress)
        plan.save(path)
    return RankPlan.load(path)


def _measured_on(examples: Classification | LanguageModel, eval_data: Path | None) -> str:
    count = len(examples.held_out)
    if eval_data is None:
        return f"{count:,} of the training examples (--eval-data gives others)"
    return f"{count:,} examples of {eval_data.name}"


def _say(result: Result, folder: Path, as_json: Understood | None) -> None:
    if as_json is not None:
        found = {"adapter": str(folder), "understood": as_json.as_json()}
        print(json.dumps({**found, **asdict(result)}))
        return
    table = Table(title=f"On {result.measured_on}", box=box.SIMPLE_HEAD)
    for column in ("metric", "before", "after"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in result.after.items():
        if name not in ("examples", "tokens"):
            table.add_row(name, f"{result.before[name]:.4g}", f"{value:.4g}")
    show(table)
    last = f", training loss {result.curve[-1][1]:.4g} at the end" if result.curve else ""
    print(f"{result.steps:,} steps{last}, {result.parameters:,} adapter parameters")
    say_written(folder)
