"""Options that several commands have, and what is read from their text."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from adarank_fast.errors import AdarankError
from adarank_fast.options import DTYPES, RANGES, TARGET_PRESETS, check_number
from adarank_fast.options import parse_scaling as parse_scaling

MODEL = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, or a name on the hub.", show_default=False),
]
TEXTS = "Rows: .jsonl, .csv, .parquet, .txt, ...; a datasets folder or name. See docs/data.md."
DATA = Annotated[Path, typer.Option(help=TEXTS, show_default=False)]
TARGET_MODULES = Annotated[
    str,
    typer.Option(
        help='"auto" (attention, and experts where there are any), "attention", "all-linear", '
        '"experts", names; several of them separated by commas; or a regex.'
    ),
]
TASK = Annotated[
    str,
    typer.Option(help="auto (classification if there are labels), classification or causal-lm."),
]
EPOCHS = Annotated[int, typer.Option(min=1, help="Passes over the training data.")]
MAX_STEPS = Annotated[int | None, typer.Option(min=1, help="Stop after this many steps.")]
BATCH_SIZE = Annotated[int, typer.Option(min=1, help="Examples per step.")]
MAX_LENGTH = Annotated[
    int, typer.Option(min=1, help="Tokens of a text at most; of a language model's block exactly.")
]
SCALING = Annotated[
    str,
    typer.Option(help="lora_alpha / rank: constant (2), paper (8 / rank), rslora, or a number."),
]
DTYPE = Annotated[str, typer.Option(help=f"Type of the frozen weights: {', '.join(DTYPES)}.")]
TEXT_COLUMN = Annotated[str | None, typer.Option(help="Column of the texts; guessed if left out.")]
LABEL_COLUMN = Annotated[
    str | None, typer.Option(help="Column of the labels; guessed if left out.")
]
TRUST_REMOTE_CODE = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code from the model's folder.")
]
JSON = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]


def flat(*classes: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the fields of these dataclasses options of a command, which gets an object of each.

    The command's argument for an object is named like its class, in lower case.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        names = {cls.__name__.lower(): cls for cls in classes}
        parameters = []
        for name, parameter in signature.parameters.items():
            if name in names:
                parameters += [_parameter(names[name], one) for one in fields(names[name])]
            else:
                parameters.append(parameter)

        @wraps(command)
        def run(**given: object) -> None:
            for name, cls in names.items():
                values = {}
                for one in fields(cls):
                    value = given.pop(_called(one), one.metadata["typed"])
                    parse = one.metadata["parse"]
                    values[one.name] = value if parse is None or value is None else parse(value)
                try:
                    given[name] = cls(**values)
                except AdarankError as error:
                    raise AdarankError(_with_flags(str(error), cls)) from error
            command(**given)

        _declare(run, signature.replace(parameters=parameters))
        owned = (_called(one) for cls in classes for one in fields(cls))
        run.checked_elsewhere = frozenset(owned)  # type: ignore[attr-defined]
        return run

    return decorate


def checked(command: Callable[..., None]) -> Callable[..., None]:
    """Check a command's numbers before it runs, and add --trust-remote-code where it loads a model.

    A number's range is found by its name in `RANGES`. Options that `flat` made are left to their
    dataclass, which has checked them.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters = list(signature.parameters.values())
    loads = any(one.name in ("model", "base") for one in parameters)
    if loads:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        annotation = TRUST_REMOTE_CODE
        parameters.append(
            inspect.Parameter("trust_remote_code", kind, default=False, annotation=annotation)
        )
    elsewhere = getattr(command, "checked_elsewhere", ())

    @wraps(command)
    def run(**given: object) -> None:
        trust = given.pop("trust_remote_code", False)
        for name, value in given.items():
            if name in RANGES and name not in elsewhere and isinstance(value, (int, float)):
                check_number(f"--{name.replace('_', '-')}", value)
        if not loads:
            return command(**given)
        from adarank_fast.models.remote_code import trusting

        with trusting(bool(trust)):
            command(**given)

    _declare(run, signature.replace(parameters=parameters))
    return run


def _declare(command: Callable[..., None], signature: inspect.Signature) -> None:
    """Give a function the signature that typer reads."""
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in signature.parameters.values()}


def _with_flags(message: str, cls: type) -> str:
    """The message with options named as on the command line: --average-rank for average_rank=."""
    for one in fields(cls):
        flag = f"--{_called(one).replace('_', '-')} "
        message = re.sub(rf"\b{one.name}=|^{one.name} ", flag, message)
    return message


def _called(one: Field[object]) -> str:
    return one.metadata["flag"] or one.name


def _parameter(cls: type, one: Field[object]) -> inspect.Parameter:
    said = one.metadata
    kind: Any = one.metadata["kind"] or eval(str(one.type), vars(sys.modules[cls.__module__]))
    names = [f"--{_called(one).replace('_', '-')}"] if kind is bool else []  # without --no-...
    annotation: object = Annotated[kind, typer.Option(*names, **said["said"])]
    where = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(_called(one), where, default=said["typed"], annotation=annotation)


def parse_target_modules(text: str) -> str | list[str]:
    """Names separated by commas become a list; a preset alone and regexes stay."""
    names = [name.strip() for name in text.split(",")]
    if text in TARGET_PRESETS or not all(re.fullmatch(r"[\w.-]+", n) for n in names):
        return text
    return names
