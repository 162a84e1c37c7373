"""The command `adarank train`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich import box
from rich.table import Table

from adarank_fast.cli import options
from adarank_fast.cli.console import quiet_transformers, say_written, show, status, typed
from adarank_fast.cli.train_options import Ranks, Settings
from adarank_fast.errors import AdarankError
from adarank_fast.options import DEFAULT_TARGETS, DTYPES, check_choice
from adarank_fast.plan.budget import DEFAULT_AVERAGE_RANK, Budget
from adarank_fast.plan.lora_config import alpha_rule, refuse_for_experts

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from adarank_fast.models.targets import TargetModules
    from adarank_fast.plan.rank_plan import RankPlan
    from adarank_fast.training.arguments import Fields
    from adarank_fast.training.card import Result
    from adarank_fast.training.classification import Classification
    from adarank_fast.training.data import Data, Understood
    from adarank_fast.training.language_model import LanguageModel
    from adarank_fast.training.loading import LoraOptions

    Examples = Classification | LanguageModel

CALIBRATION = 64  # examples that ranks are predicted on


@options.flat(Ranks, Settings)
def train(
    model: options.MODEL,
    data: options.DATA,
    ranks: Ranks,
    settings: Settings,
    target_modules: options.TARGET_MODULES = DEFAULT_TARGETS,
    output_folder: Annotated[
        Path, typer.Option("--output-folder", "-o", help="Where to put the adapter.")
    ] = Path("adapter"),
    eval_data: Annotated[
        Path | None, typer.Option(help="Data to measure on; default: some of the training data.")
    ] = None,
    task: options.TASK = "auto",
    text_column: options.TEXT_COLUMN = None,
    label_column: options.LABEL_COLUMN = None,
    scaling: options.SCALING = "constant",
    lora_dropout: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Dropout in front of the adapters.")
    ] = 0.0,
    dtype: options.DTYPE = "float32",
    four_bit: Annotated[
        bool, typer.Option("--four-bit", help="Keep the frozen weights in 4 bits (bitsandbytes).")
    ] = False,
    as_json: options.JSON = False,
) -> None:
    """Train adapters on MODEL. The same command continues a run that was interrupted."""
    check_choice("--dtype", dtype, DTYPES)
    if settings.early_stopping is not None and eval_data is None:
        raise AdarankError("--early-stopping needs --eval-data to watch")
    alpha_rule(options.parse_scaling(scaling))  # refuses an unknown scaling
    from adarank_fast.plan.rank_plan import RankPlan
    from adarank_fast.training.arguments import config_class, make_arguments
    from adarank_fast.training.loading import check_task
    from adarank_fast.training.run import check_adapter_folder

    quiet_transformers()
    check_adapter_folder(output_folder)
    plan = None if ranks.plan is None else RankPlan.load(ranks.plan)
    rows, held_out = _read(data, eval_data, text_column, label_column, task)
    config_class(rows.task)  # refuses a missing trl before a model is loaded
    fields = settings.fields(rows.task)
    make_arguments(rows.task, fields, output_folder)  # refuses fields that contradict each other
    check_task(model, rows.task)
    job = _Job(
        model=model,
        rows=rows,
        held_out=held_out,
        data=[path.name for path in (data, eval_data) if path is not None],
        plan=plan,
        ranks=ranks,
        target_modules=options.parse_target_modules(target_modules),
        scaling=scaling,
        lora_dropout=lora_dropout,
        fields=fields,
        early_stopping=settings.early_stopping,
        dtype=dtype,
        four_bit=four_bit,
        folder=output_folder,
    )
    result = _run(job)
    verb = "evaluate" if eval_data is None else "apply"
    then = typed(
        "adarank", verb, model, output_folder, "--data", "FILE", *["--four-bit"] * four_bit
    )
    _say(result, output_folder, then, rows.understood if as_json else None)


@dataclass(frozen=True)
class _Job:
    """All that one call trains with, read and checked; `data` has the names of the files."""

    model: str
    rows: Data
    held_out: Data | None
    data: Sequence[str]
    plan: RankPlan | None
    ranks: Ranks
    target_modules: TargetModules
    scaling: str
    lora_dropout: float
    fields: Fields
    early_stopping: int | None
    dtype: str
    four_bit: bool
    folder: Path

    @property
    def source(self) -> dict[str, object]:
        """Where the ranks come from, for comparison with the run that is continued."""
        if self.plan is not None:
            return {"plan": self.plan.ranks}
        source: dict[str, object] = {"rank": self.ranks.rank}
        if self.ranks.rank is None:
            source = {"average_rank": self.ranks.average_rank or DEFAULT_AVERAGE_RANK}
        if self.ranks.expert_rank != "whole":
            source["expert_rank"] = self.ranks.expert_rank
        return {**source, "target_modules": self.target_modules}

    def noted(self, network: PreTrainedModel, data: str) -> dict[str, object]:
        """Everything that must be unchanged for a run to be continued."""
        from adarank_fast.models.identity import digest_weights

        return {
            **{"model": self.model, "weights": digest_weights(network), "task": self.rows.task},
            **{"data": data, "settings": self.fields},
            **{"ranks": self.source, "scaling": self.scaling, "lora_dropout": self.lora_dropout},
            **{"dtype": self.dtype, "four_bit": self.four_bit},
            "early_stopping": self.early_stopping,
        }


def _read(
    data: Path, eval_data: Path | None, text_column: str | None, label_column: str | None, task: str
) -> tuple[Data, Data | None]:
    """The training data and the held-out data. Says on stderr how they were understood."""
    from adarank_fast.training.data import check_alike, read_data

    read = partial(read_data, text_column=text_column, label_column=label_column)
    rows = read(data, task=task)
    print(rows.understood, file=sys.stderr)
    if eval_data is None:
        return rows, None
    held_out = read(eval_data, task=rows.task)
    check_alike(rows, held_out)
    print(held_out.understood, file=sys.stderr)
    return rows, held_out


def _run(job: _Job) -> Result:
    """Load the model, give it adapters, train and save them; or continue such a run."""
    from transformers import set_seed

    from adarank_fast.adapters.inject import inject
    from adarank_fast.training.card import write_beside
    from adarank_fast.training.run import PLAN, finish, unfinished_run

    seed = int(job.fields["seed"])
    set_seed(seed)
    tokenizer, examples, network, lora_config = _load(job)
    with unfinished_run(job.folder, job.noted(network, examples.digest())) as checkpoints:
        lora_config["lora_dropout"] = job.lora_dropout
        refuse_for_experts(_experts(job, network), lora_config)
        plan = _plan(job, network, examples, checkpoints)
        set_seed(seed)
        (example,) = examples.calibration(1, network.device)  # fused from the first step on
        scaling = options.parse_scaling(job.scaling)
        peft_model = inject(network, plan, scaling, example, **lora_config)
        result = _fit(job, peft_model, examples, plan, checkpoints)

        def beside(folder: Path) -> None:
            plan.save(folder / PLAN)
            write_beside(folder, result, network.config, tokenizer, job.folder)

        finish(job.folder, checkpoints, peft_model, beside)
    return result


def _load(
    job: _Job,
) -> tuple[PreTrainedTokenizerBase, Examples, PreTrainedModel, LoraOptions]:
    """The tokenizer, the tokenised data, the model, and what `LoraConfig` needs for it."""
    import torch

    from adarank_fast.training.classification import Classification
    from adarank_fast.training.language_model import LanguageModel
    from adarank_fast.training.loading import load_model, load_tokenizer

    rows = job.rows
    with status(f"loading {job.model}"):
        tokenizer = load_tokenizer(job.model)
        kind = Classification if rows.task == "classification" else LanguageModel
        examples = kind(rows, job.held_out, tokenizer, job.fields)
        network, lora_config = load_model(
            *(job.model, rows.task, rows.classes),
            tokenizer=tokenizer,
            dtype=job.dtype,
            four_bit=job.four_bit,
        )
        if not job.four_bit and torch.cuda.is_available():
            cast("nn.Module", network).to("cuda")
    return tokenizer, examples, network, lora_config


def _fit(
    job: _Job, peft_model: PeftModel, examples: Examples, plan: RankPlan, checkpoints: Path
) -> Result:
    """Train, and measure without and with the adapters."""
    from tqdm import tqdm
    from transformers import EarlyStoppingCallback

    from adarank_fast.training.arguments import make_arguments
    from adarank_fast.training.card import Result
    from adarank_fast.training.loading import has_other_head
    from adarank_fast.training.run import Progress, run

    rows = job.rows
    with tqdm(disable=not sys.stderr.isatty(), leave=False) as bar:
        callbacks: list[TrainerCallback] = [Progress(bar)]
        if job.early_stopping is not None:
            callbacks.append(EarlyStoppingCallback(job.early_stopping))
        arguments = make_arguments(rows.task, job.fields, checkpoints)
        trainer = examples.trainer(peft_model, arguments, callbacks)
        training = run(trainer, checkpoints)
    with peft_model.disable_adapter():  # the base model, with the head as initialised
        before = examples.measure(trainer)
    return Result(
        base_model=job.model,
        task=rows.task,
        form=rows.form,
        classes=rows.classes,
        data=job.data,
        examples=len(rows.rows),
        ranks=plan.ranks,
        parameters=plan.parameters,
        settings=job.fields,
        steps=len(training.losses),
        measured_on=_measured_on(job, len(examples.held_out)),
        before=before,
        after=examples.measure(trainer),
        curve=training.curve(),
        other_head=has_other_head(job.model, rows.task, rows.classes),
    )


def _experts(job: _Job, network: PreTrainedModel) -> list[str]:
    """The parameters of experts that get a rank."""
    from adarank_fast.models.targets import find_targets

    if job.plan is not None:
        return [name for name in job.plan.experts if job.plan.ranks[name]]
    targets = find_targets(network, job.target_modules)
    return [target.name for target in targets if target.parameter]


def _plan(job: _Job, network: PreTrainedModel, examples: Examples, checkpoints: Path) -> RankPlan:
    """The given plan, a uniform one, or a prediction; a resumed run does not predict again."""
    from adarank_fast.plan.rank_plan import RankPlan
    from adarank_fast.prediction.predict import predict_ranks
    from adarank_fast.training.run import PLAN

    if job.plan is not None:
        return job.plan
    if job.ranks.rank is not None:
        return RankPlan.uniform(network, job.ranks.rank, job.target_modules, job.ranks.expert_rank)
    path = checkpoints / PLAN
    if not path.exists():
        batches = examples.calibration(CALIBRATION, network.device)
        targets, progress = job.target_modules, sys.stderr.isatty()
        budget = Budget(job.ranks.average_rank, expert_rank=job.ranks.expert_rank)
        plan = predict_ranks(network, batches, budget, targets, progress=progress)
        plan.save(path)
    return RankPlan.load(path)


def _measured_on(job: _Job, count: int) -> str:
    if job.held_out is None:
        return f"{count:,} of the training examples (--eval-data gives others)"
    return f"{count:,} examples of {job.data[-1]}"


def _say(result: Result, folder: Path, then: str, as_json: Understood | None) -> None:
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
    say_written(folder, then)
