"""The command `adarank export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adarank_fast.cli.console import quiet_transformers, say_written
from adarank_fast.cli.options import JSON, SCALING, parse_scaling
from adarank_fast.errors import AdarankError
from adarank_fast.files import check_file, check_folder


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="An adapter folder, or a plan.json.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder (adapter) or file (plan) to write; without it, a plan is printed.",
            show_default=False,
        ),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform", help="For an adapter: one rank and scale 1 everywhere, to serve it."
        ),
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            help="For an adapter: its rank, 8, 16, 32 or 64.", show_default="the smallest that fits"
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="For an adapter: folder or hub name of the base model; only its configuration "
            "is read.",
            show_default="the adapter's",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="For a plan: peft, axolotl or llama-factory.", show_default="peft"),
    ] = None,
    scaling: SCALING = "constant",
    as_json: JSON = False,
) -> None:
    """Write an adapter that any engine serves, or a plan as a trainer's settings."""
    if not source.exists():
        raise AdarankError(
            f"SOURCE {str(source)!r} does not exist; name an adapter folder or a plan"
        )
    if source.is_dir():
        if format is not None:
            raise AdarankError(
                "--format is for plans; an adapter folder is exported with --uniform"
            )
        if not uniform or output is None:
            raise AdarankError("to export an adapter folder, give --uniform and -o FOLDER")
        _export_adapter(source, output, rank, base, as_json)
        return
    if uniform or rank is not None or base is not None:
        raise AdarankError("--uniform, --rank and --base are for adapter folders, not plans")
    if output is not None:
        check_file(output, [source])
    from adarank_fast.plan.rank_plan import RankPlan
    from adarank_fast.plan.trainer_formats import export_plan, render

    plan, chosen = RankPlan.load(source), format or "peft"
    if output is None:
        print(render(plan, chosen, parse_scaling(scaling)), end="")
    else:
        export_plan(plan, output, chosen, parse_scaling(scaling))
        then = f"put its lines into the configuration file of {chosen}"
        if chosen == "peft":
            then = f'peft.LoraConfig(**json.load(open("{output}")))'
        say_written(output, then, {"export": str(output), "format": chosen} if as_json else None)


def _export_adapter(
    source: Path, output: Path, rank: int | None, base: str | None, as_json: bool
) -> None:
    check_folder(output)
    from adarank_fast.adapters.adapter_files import read_adapter
    from adarank_fast.adapters.export import check_rank, export_saved
    from adarank_fast.adapters.merge import base_skeleton

    check_rank(rank)
    quiet_transformers()
    adapter = read_adapter(source)
    skeleton, _ = base_skeleton(adapter, base, "--base")
    rank = export_saved(adapter, skeleton, output, rank)
    then = f"serve it as an adapter of rank {rank}, such as by vllm's --max-lora-rank {rank}"
    say_written(output, then, {"export": str(output), "rank": rank} if as_json else None)
