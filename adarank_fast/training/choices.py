"""The names that options take. No torch here: the command line's `--help` reads them."""

from __future__ import annotations

from collections.abc import Sequence

from adarank_fast.errors import AdarankError

TASKS = ("classification", "causal-lm")
DTYPES = ("float32", "bfloat16", "float16")


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """An AdarankError of one line unless `value` is one of `choices`."""
    if value not in choices:
        said = f"{argument} {value!r}" if argument.startswith("-") else f"{argument}={value!r}"
        raise AdarankError(f"{said} is unknown; use one of {', '.join(choices)}")
