"""Text for people: parts of error messages, and tables without a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from adarank_fast.errors import AdarankError, AdarankImportError

WIDTH = 80  # columns of text, where nobody says how many there are

if TYPE_CHECKING:
    import pandas
    from rich.console import RenderableType


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something, or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said if len(said) <= 600 else f"{said[:596]} ..."


def list_names(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many there are if that is more."""
    shown = ", ".join(names[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown


@contextmanager
def loading(what: str, name: str, remedy: str = "") -> Iterator[None]:
    """Turn any error in loading a user's files into an `AdarankError`.

    Raises:
        AdarankError: cannot load `what` of the model `name`; `remedy`.
    """
    try:
        yield
    except Exception as error:
        where = "folder" if os.path.isdir(name) else "no such folder, so a hub name"
        if "trust_remote_code" in str(error):
            raise AdarankError(
                f"the {what} {name!r} ({where}) brings code of its own; read it, and give "
                "--trust-remote-code if it may be run (in Python: load the model yourself)"
            ) from None
        raise AdarankError(
            f"cannot load the {what} {name!r} ({where}){remedy}: {first_line(error)}"
        ) from error


def data_frame(rows: Mapping[str, Mapping[str, object]]) -> pandas.DataFrame:
    """A row for each key, a column for each key of the rows.

    Raises:
        AdarankImportError: pandas is not installed.
    """
    if find_spec("pandas") is None:
        raise AdarankImportError("to_frame needs pandas: pip install pandas")
    from pandas import DataFrame

    return DataFrame.from_dict(rows, orient="index")


def plain_text(*tables: RenderableType, blank_lines: bool = False, width: int = WIDTH) -> str:
    """Rich tables as text: `width` columns at most, without colours and spaces at line ends."""
    from rich.console import Console

    console = Console(width=width, color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    lines = (line.rstrip() for line in captured.get().strip("\n").splitlines())
    return "\n".join(line for line in lines if line or blank_lines)


def by(size: tuple[int, int], experts: int = 1) -> str:
    """As "in x out"; of experts that stand side by side "8 of in x out"."""
    one = f"{size[0] // experts} x {size[1] // experts}"
    return f"{experts} of {one}" if experts > 1 else one
