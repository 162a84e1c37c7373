"""How files are written: whole, under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: its folder does not exist")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error.

    Raises:
        ValueError: `path` is a file or a folder with something in it.
        FileNotFoundError: the folder to make it in does not exist.
    """
    path = Path(path).absolute()
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"folder {str(path)!r} is not empty; name a new one")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file; name a new folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: its folder does not exist")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)  # fails if something has been put there meanwhile
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
