"""How files are written: whole, under a temporary name, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adarank_fast.errors import AdarankError, AdarankFileNotFoundError, AdarankPermissionError

Name = str | os.PathLike[str]


@contextmanager
def replacing(path: Name) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error.

    A symbolic link stays one: the file that it names is replaced. A replaced file's permissions are
    kept.

    Raises:
        AdarankError: see `check_file`.
    """
    target = check_file(path)
    temporary = _beside(target)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())  # else a crash can leave the new name on an empty file
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Name, text: str) -> None:
    """Write a text file with `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: Name, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error.

    Args:
        path: not there, or an empty folder.
        replace: a folder with something in it is replaced.

    Raises:
        AdarankError: see `check_folder`.
    """
    target = check_folder(path, replace)
    temporary, old = _beside(target), _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        if replace and target.exists():  # a rename cannot replace a folder that is not empty
            os.replace(target, old)
        try:
            os.replace(temporary, target)  # fails if something has been put there meanwhile
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_file(path: Name) -> Path:
    """The file that writing to `path` would make or replace.

    Raises:
        AdarankError: `path` is a folder or a device.
        AdarankFileNotFoundError: the folder to make it in does not exist.
        AdarankPermissionError: that folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise AdarankError(f"cannot write {str(path)!r}: it is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise AdarankError(f"cannot write {str(path)!r}: it is no regular file; name another")
    _check_parent(path, target)
    return target


def check_folder(path: Name, replace: bool = False) -> Path:
    """The folder that `new_folder` would make.

    Raises:
        AdarankError: `path` is a file or, unless it may be replaced, a folder with something in it.
        AdarankFileNotFoundError: the folder to make it in does not exist.
        AdarankPermissionError: that folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise AdarankError(f"{str(path)!r} is a file; name a folder")
    if target.is_dir() and not replace and any(target.iterdir()):
        raise AdarankError(f"folder {str(path)!r} is not empty; name a new one")
    _check_parent(path, target)
    return target


def note_settings(folder: Path, settings: Mapping[str, Any], holds: str, remedy: str) -> str:
    """Note in `folder` with what settings its content is made; or check that they are the same.

    Returns:
        When they were noted first.

    Raises:
        AdarankError: `folder` `holds` something made with other settings.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_text(path, json.dumps({**settings, "date": date}, indent=1) + "\n")
        return date
    before = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if before.get(key) != value:
            raise AdarankError(
                f"{str(folder)!r} holds {holds} with {key} = {before.get(key)!r}, now {value!r}; "
                f"{remedy}"
            )
    return str(before.get("date", ""))


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _check_parent(path: Name, target: Path) -> None:
    if not target.parent.is_dir():
        raise AdarankFileNotFoundError(
            f"cannot write {str(path)!r}: its folder does not exist; make it"
        )
    if not os.access(target.parent, os.W_OK):
        raise AdarankPermissionError(f"cannot write {str(path)!r}: its folder cannot be written")
