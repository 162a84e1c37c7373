"""Undo changes reliably, even when Ctrl-C arrives while they are being undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` at the end, whatever happens.

    It is called twice, so that a KeyboardInterrupt inside of one call does no harm: a second call
    must change nothing.
    """
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


@contextmanager
def undone_on_error(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` if an exception leaves the context, KeyboardInterrupt included; see `undone`."""
    try:
        try:
            yield
        except BaseException:
            undo()
            raise
    except BaseException:
        undo()
        raise
