"""The names that options take. No torch here: the command line's `--help` reads them."""

from __future__ import annotations

from collections.abc import Sequence

TASKS = ("classification", "causal-lm")
DTYPES = ("float32", "bfloat16", "float16")


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """A ValueError of one line unless `value` is one of `choices`."""
    if value not in choices:
        said = f"{argument} {value!r}" if argument.startswith("-") else f"{argument}={value!r}"
        raise ValueError(f"{said} is unknown; use one of {', '.join(choices)}")
