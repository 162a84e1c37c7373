"""Options that several commands have, and what is read from their text."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from adarank_fast.errors import AdarankError
from adarank_fast.plan.uncertainty import AdaptiveTrials
from adarank_fast.training.choices import DTYPES

MODEL = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, or a name on the hub.", show_default=False),
]
TEXTS = "Texts, with labels for classification: .jsonl, .csv, .tsv or .txt."
DATA = Annotated[Path, typer.Option(help=TEXTS, show_default=False)]
TARGET_MODULES = Annotated[
    str, typer.Option(help='"attention", "all-linear", names separated by commas, or a regex.')
]
TASK = Annotated[str, typer.Option(help="auto (by the labels), classification or causal-lm.")]
EPOCHS = Annotated[int, typer.Option(min=1, help="Passes over the training data.")]
MAX_STEPS = Annotated[int | None, typer.Option(min=1, help="Stop after this many steps.")]
BATCH_SIZE = Annotated[int, typer.Option(min=1, help="Items a step.")]
MAX_LENGTH = Annotated[int, typer.Option(min=1, help="Tokens of a text, or of a block.")]
SCALING = Annotated[
    str,
    typer.Option(help="lora_alpha / rank: constant (2), paper (8 / rank), rslora, or a number."),
]
DTYPE = Annotated[str, typer.Option(help=f"Of the frozen weights: {', '.join(DTYPES)}.")]
TEXT_COLUMN = Annotated[str | None, typer.Option(help="Column of the texts; guessed if left out.")]
LABEL_COLUMN = Annotated[
    str | None, typer.Option(help="Column of the labels; guessed if left out.")
]
JSON = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")]


def parse_trials(text: str) -> int | AdaptiveTrials:
    """ "5" -> 5; "2-10" -> AdaptiveTrials(2, 10)."""
    numbers = text.split("-")
    if not all(number.isdecimal() and int(number) for number in numbers) or len(numbers) > 2:
        raise AdarankError(
            f"--trials {text!r} is neither a positive number nor a range such as 2-10"
        )
    return int(text) if len(numbers) == 1 else AdaptiveTrials(int(numbers[0]), int(numbers[1]))


def parse_target_modules(text: str) -> str | list[str]:
    """Names separated by commas become a list; "attention", "all-linear" and regexes stay."""
    names = [name.strip() for name in text.split(",")]
    if text in ("attention", "all-linear") or not all(re.fullmatch(r"[\w.-]+", n) for n in names):
        return text
    return names


def parse_scaling(text: str) -> str | float:
    """A number, or the word as it is."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_numbers(option: str, text: str) -> list[float]:
    """Numbers separated by commas."""
    numbers = [parse_scaling(part) for part in text.split(",")]
    if any(isinstance(number, str) for number in numbers):
        raise AdarankError(
            f"{option} {text!r}: give numbers separated by commas, such as 1e-3,2e-3"
        )
    return [float(number) for number in numbers]


def parse_function(option: str, name: str) -> Callable[..., Any]:
    """The function that `module:function` names; modules of the working folder are found too."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise AdarankError(f"{option} {name!r}: {error}; give module:function") from error
    finally:
        sys.path.remove("")
