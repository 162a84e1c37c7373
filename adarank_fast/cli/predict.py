"""The command `adarank predict`."""

from __future__ import annotations

import json
import random
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from adarank_fast.cli import options
from adarank_fast.cli.console import quiet_transformers, say_next, say_written, show, status, typed
from adarank_fast.cli.options import parse_target_modules
from adarank_fast.files import check_file
from adarank_fast.models.text import WIDTH, by
from adarank_fast.options import DEFAULT_TARGETS, DTYPES, check_choice
from adarank_fast.plan.budget import Budget
from adarank_fast.prediction.probe import Limits, Probe
from adarank_fast.training.data import read_data

if TYPE_CHECKING:
    from adarank_fast.models.targets import Target
    from adarank_fast.prediction.cost import CostEstimate


@options.flat(Budget, Probe, Limits)
def predict(
    model: options.MODEL,
    data: Annotated[
        Path,
        typer.Option(
            help="Calibration data, in any format that `train` reads: .jsonl, .csv, .txt, ...",
            show_default=False,
        ),
    ],
    budget: Budget,
    probe: Probe,
    limits: Limits,
    output_file: Annotated[
        Path, typer.Option("--output-file", "-o", help="Where to write the plan.")
    ] = Path("plan.json"),
    target_modules: options.TARGET_MODULES = DEFAULT_TARGETS,
    samples: Annotated[
        int,
        typer.Option(min=1, help="Use this many texts, drawn at random; all if there are fewer."),
    ] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per batch.")] = 16,
    max_length: Annotated[int, typer.Option(min=1, help="Cut texts to this many tokens.")] = 128,
    text_column: options.TEXT_COLUMN = None,
    label_column: options.LABEL_COLUMN = None,
    task: options.TASK = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"Load weights as {', '.join(DTYPES)} or auto.")
    ] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show modules and cost; predict and write nothing.")
    ] = False,
    as_json: options.JSON = False,
) -> None:
    """Predict a LoRA rank for every module of MODEL; language models are loaded with their head."""
    check_choice("--dtype", dtype, (*DTYPES, "auto"))
    names = parse_target_modules(target_modules)
    if not dry_run:
        read = [model, data, *([] if limits.checkpoint is None else [limits.checkpoint])]
        check_file(output_file, read)

    found = read_data(data, text_column=text_column, label_column=label_column, task=task)
    print(found.understood, file=sys.stderr)
    rows, understood = found.rows, found.understood.as_json()
    if samples < len(rows):
        chosen = sorted(random.Random(probe.seed).sample(range(len(rows)), samples))
        rows = [rows[index] for index in chosen]
    from adarank_fast.training.language_model import full_text, is_chat
    from adarank_fast.training.loading import calibration_batches, load_pretrained

    quiet_transformers()
    with status(f"loading {model}"):
        network, tokenizer = load_pretrained(model, device, dtype, threads)
        texts = [full_text(row, tokenizer) for row in rows]  # as training sees them
        special = not is_chat(rows[0])  # a template writes them
        batches = calibration_batches(network, tokenizer, texts, batch_size, max_length, special)
    if dry_run:
        from adarank_fast.models.targets import find_targets
        from adarank_fast.prediction.cost import estimate_cost

        with status("timing one forward"):
            cost = estimate_cost(network, batches, names, probe.trials, probe.output)
        _show_cost(find_targets(network, names), cost, understood if as_json else None)
        return
    from adarank_fast.prediction.distributed import started_by_torchrun
    from adarank_fast.prediction.predict import predict_ranks

    with started_by_torchrun() as processes:
        plan = predict_ranks(
            network, batches, budget, names, probe, limits, progress=sys.stderr.isatty()
        )
    if processes.rank:
        return
    plan.save(output_file)
    if as_json:
        scores = {name: {"mean": s.mean, "std": s.std} for name, s in plan.scores.items()}
        made = {"plan": str(output_file), "parameters": plan.parameters, "ranks": plan.ranks}
        made |= {"scores": scores, "settings": plan.settings, "understood": understood}
        print(json.dumps(made))
    else:
        print(plan.table())
        say_written(
            output_file, typed("adarank", "train", model, "--data", data, "--plan", output_file)
        )


def _show_cost(
    targets: Sequence[Target], cost: CostEstimate, understood: Mapping[str, object] | None
) -> None:
    if understood is not None:
        sizes = ("name", "in_features", "out_features", "experts", "block")
        modules = [
            {**{key: getattr(t, key) for key in sizes}, "route": cost.routes[t.name]}
            for t in targets
        ]
        numbers = {key: value for key, value in vars(cost).items() if key != "routes"}
        print(json.dumps({"modules": modules, "cost": numbers, "understood": understood}))
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("module", "in x out", "group", "route"):
        table.add_column(column, overflow="fold", justify="right" if "x" in column else "left")
    group_of = {name: str(i) for i, group in enumerate(cost.groups, 1) for name in group}
    for target in targets:
        shape = by((target.in_features, target.out_features), target.experts)
        group, route = group_of.get(target.name, "-"), cost.routes[target.name]
        table.add_row(target.name, shape, group, route)
    show(table)
    seconds = f"{cost.seconds:.1f} s" if cost.seconds < 120 else f"{cost.seconds / 60:.0f} min"
    said = (
        f"{cost.modules} modules, {cost.blocks} blocks, {len(cost.groups)} groups that share an "
        f"input, {cost.probes:,} probes: about {seconds}, "
        f"{cost.flops / 1e12:.3g} TFLOP ({cost.naive_flops / 1e12:.3g} without replay), "
        f"{cost.memory_bytes / 2**20:,.0f} MiB beside the model"
    )
    print(textwrap.fill(said, WIDTH))
    if cost.suggestion:
        print(textwrap.fill(cost.suggestion, WIDTH))
    say_next("the same command without --dry-run")
