"""Whether a model's folder may bring code of its own that is run to load it: never unasked.

transformers asks on the terminal where it is not told. Whoever loads from a folder or a hub name
therefore says `trust_remote_code=is_trusted()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_trusted = ContextVar("trusted", default=False)


def is_trusted() -> bool:
    """Whether code from model folders may be run here."""
    return _trusted.get()


@contextmanager
def trusting(code: bool) -> Iterator[None]:
    """Let code from model folders be run, or not, within the block."""
    before = _trusted.set(code)
    try:
        yield
    finally:
        _trusted.reset(before)
