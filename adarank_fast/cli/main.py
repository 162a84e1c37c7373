"""The command `adarank`. Each command imports what it needs itself, so that `--help` is fast."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from adarank_fast.cli.apply import apply
from adarank_fast.cli.bench import bench
from adarank_fast.cli.compare import compare
from adarank_fast.cli.demo import demo
from adarank_fast.cli.evaluate import evaluate
from adarank_fast.cli.export import export
from adarank_fast.cli.merge import merge
from adarank_fast.cli.options import checked
from adarank_fast.cli.plot import plot
from adarank_fast.cli.predict import predict
from adarank_fast.cli.train import train
from adarank_fast.errors import AdarankError

BUG, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit statuses

app = typer.Typer(
    name="adarank",
    help="Mixed-rank LoRA: predict a rank for every module, before training and without labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0; 2 with one line on stderr for bad input; 130 after Ctrl-C.

    Anything else is a bug: its traceback, a line that asks to report it, and 1.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # peft imports them
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        status = app(args=arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:  # adarank ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        sys.exit(_report(error))
    if status == INTERRUPTED:  # typer may also have turned Ctrl-C into this status
        print("adarank: interrupted", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _report(error: Exception) -> int:
    """Say on stderr what went wrong, and return the exit status."""
    if hasattr(error, "format_message"):  # typer's: unknown option, missing argument
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            return BAD_INPUT
        message = f"{error.format_message().rstrip('.')}; see --help"
    elif isinstance(error, AdarankError) or isinstance(error, OSError) and error.errno is not None:
        message = str(error)
    else:
        traceback.print_exception(error)
        print("adarank: this is a bug; please report it with the lines above", file=sys.stderr)
        return BUG
    print(f"adarank: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"adarank-fast {version('adarank-fast')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


for command in (predict, train, evaluate, apply, bench, compare, plot, export, merge, demo):
    app.command()(checked(command))
