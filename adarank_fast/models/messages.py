"""Parts of error messages; each error is one line that names the value and the remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def list_names(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many there are if that is more."""
    shown = ", ".join(names[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown


@contextmanager
def loading(what: str, name: str, remedy: str = "") -> Iterator[None]:
    """Whatever goes wrong in loading files that somebody else made is bad input.

    Raises:
        ValueError: cannot load `what` of the model `name`; `remedy`.
    """
    try:
        yield
    except Exception as error:
        where = "folder" if os.path.isdir(name) else "no such folder, so a hub name"
        raise ValueError(
            f"cannot load the {what} {name!r} ({where}){remedy}: {first_line(error)}"
        ) from error
