"""Options that are typed once: frozen dataclasses own names, defaults, checks and help texts.

Public functions take such an object, or its fields as flat keywords. No torch here.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from importlib.metadata import entry_points
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar, cast

from adarank_fast.errors import AdarankError, AdarankTypeError
from adarank_fast.json_values import MOST

T = TypeVar("T")
TASKS = ("classification", "causal-lm")
DTYPES = ("float32", "bfloat16", "float16")
MOST_NAMES = 20  # in a message
OUTPUTS = ("auto", "pooler", "last_hidden_state", "logits")
DEFAULT_TARGETS = "auto"  # attention, and experts where the model has them
TARGET_PRESETS = (DEFAULT_TARGETS, "attention", "all-linear", "experts")


def option(
    default: Any,
    help: str,
    shown: str | bool = True,
    flag: str | None = None,
    kind: object = None,
    parse: Callable[[Any], Any] | None = None,
    typed: object = None,
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value where it is not given.
        help: what the command line says of it.
        shown: what the command line shows as the default.
        flag: its name on the command line if that differs; with underscores.
        kind: its type on the command line if that differs.
        parse: turns the command line's value into the field's, if they differ.
        typed: the default on the command line, if that is not the text of `default`.
    """
    said = {"help": help, "show_default": shown}
    if typed is None:
        typed = default if parse is None or default is None else str(default)
    metadata = {"flag": flag, "kind": kind, "parse": parse, "typed": typed, "said": said}
    return field(default=default, metadata=metadata)


def gather(cls: type[T], given: T | float | None, options: dict[str, object]) -> T:
    """Options as an object: the one that is given, or one made of its flat keywords.

    Args:
        cls: the dataclass.
        given: an object of it, or a value of its first field.
        options: flat keywords; those of `cls` are taken out.
    """
    names = [one.name for one in fields(cast(Any, cls))]
    mine = {name: options.pop(name) for name in names if name in options}
    if given is None:
        return cls(**mine)
    if isinstance(given, cls) and not mine or names[0] not in mine and not isinstance(given, cls):
        return given if isinstance(given, cls) else cls(**{names[0]: given}, **mine)
    raise AdarankTypeError(
        f"{next(iter(mine))} is given beside a {cls.__name__}; put it into the {cls.__name__}"
    )


def refuse_unknown(
    function: Callable[..., object], options: Mapping[str, object], *classes: type
) -> None:
    """Raise a TypeError for a misspelt keyword, as Python does; it suggests the nearest name.

    Args:
        function: whose own arguments are known too.
        options: keywords.
        classes: dataclasses whose fields `function` takes as keywords.

    Raises:
        AdarankTypeError: there is one.
    """
    own = inspect.signature(function).parameters.values()
    known = [one.name for one in own if one.kind is not one.VAR_KEYWORD]
    known += [one.name for cls in classes for one in fields(cls) if one.init]
    for name in options.keys() - {*known}:
        near = difflib.get_close_matches(name, known, 1)
        more = ", ..." if len(known) > MOST_NAMES else ""
        meant = f"it has {', '.join(known[:MOST_NAMES])}{more}"
        if near:
            meant = f"did you mean {near[0]!r}?"
        raise AdarankTypeError(f"{function.__name__} has no argument {name!r}; {meant}")


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is none of `choices`."""
    if not isinstance(value, str) or value not in choices:
        said = f"{argument} {value!r}" if argument.startswith("-") else f"{argument}={value!r}"
        raise AdarankError(f"{said} is unknown; use one of {', '.join(choices)}")


@dataclass(frozen=True)
class Range:
    """The values that a number may have.

    Attributes:
        least, most: the smallest and the largest value.
        whole: integers only.
        above: the value must be above `least`.
    """

    least: float
    most: float
    whole: bool = True
    above: bool = False

    def __contains__(self, value: object) -> bool:
        if not _is_number(value) or self.whole and not isinstance(value, Integral):
            return False
        # NaN is in no range
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        what = "integer" if self.whole else "number"
        if self.above and self.least == 0 or self.whole and self.least == 1:
            return f"a positive {what}"
        return f"{'an' if self.whole else 'a'} {what} of at least {self.least:g}"


COUNT = Range(1, MOST)
SEED = Range(0, 2**32 - 1)  # what numpy takes, and so transformers.set_seed
POSITIVE = Range(0.0, 1e15, whole=False, above=True)

# every number that a public function or a command takes, by its name
RANGES = {
    "average_rank": Range(0.0, MOST, whole=False, above=True),
    "batch_size": COUNT,
    "budget_parameters": Range(1, 2**63 - 1),
    "early_stopping": COUNT,
    "epochs": COUNT,
    "items": COUNT,
    "learning_rate": Range(0.0, 1e30, whole=False),
    "lora_dropout": Range(0.0, 0.99, whole=False),
    "max_length": COUNT,
    "max_memory": Range(1, 2**63 - 1, whole=False),
    "max_new_tokens": COUNT,
    "max_rank": COUNT,
    "max_seconds": POSITIVE,
    "max_steps": COUNT,
    "maximum": Range(2, MOST),
    "min_rank": Range(0, MOST),
    "minimum": Range(2, MOST),
    "rank": COUNT,
    "rank_multiple": COUNT,
    "samples": COUNT,
    "scaling": Range(0.0, 1e15, whole=False, above=True),
    "seed": SEED,
    "seeds": Range(1, 10_000),
    "threads": Range(1, 1024),
    "trial": Range(0, MOST),
    "trials": COUNT,
}


def check_number(argument: str, value: object, within: Range | None = None) -> Any:
    """The value as Python's own int or float, also where it is numpy's.

    Args:
        argument: its name in `RANGES`, which is its name in the message too; with `--` and hyphens
            where it is an option of a command.
        value: what was given.
        within: another range than that of the name.

    Raises:
        AdarankError: it is outside of its range, NaN, or no number.
    """
    within = within or RANGES[argument.lstrip("-").replace("-", "_")]
    if value not in within:
        bound = f" and at most {within.most:g}" if _is_number(value) and value > within.most else ""
        raise AdarankError(f"{argument} must be {within}{bound}, got {shown(value)}")
    number = cast(float, value)
    return int(number) if within.whole or isinstance(number, int) else float(number)


def check_integer(argument: str, value: object, least: int) -> None:
    """Refuse what is no integer of at least `least`."""
    check_number(argument, value, Range(least, MOST))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value as a message shows it: cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:56]} ..."


def load_function(argument: str, name: str) -> Callable[..., Any]:
    """The function that `module:function` names; modules of the working folder are found too."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        found: Callable[..., Any] = getattr(import_module(module), function)
        return found
    except (ImportError, AttributeError, ValueError) as error:
        raise AdarankError(f"{argument} {name!r}: {error}; give module:function") from error
    finally:
        sys.path.remove("")


def find_function(argument: str, name: str, group: str) -> Callable[..., Any] | None:
    """The function of an entry point of `group`, or that `module:function` names; None: neither.

    Args:
        argument: for messages.
        name: what the user gave.
        group: of entry points, such as "adarank.metrics".

    Raises:
        AdarankError: the module or the function is not there.
    """
    for entry in entry_points(group=group):
        if entry.name == name:
            found: Callable[..., Any] = entry.load()
            return found
    return load_function(argument, name) if ":" in name else None


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
