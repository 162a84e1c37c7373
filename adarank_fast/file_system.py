"""Locks of files and folders, and errors of writing in one line.

A lock is taken on an open file or folder itself, so there is no lock file beside it, and none is
needed where nothing can be written. It ends with the process, however that ends. Where a file
system has no locks, nothing is locked.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

from adarank_fast.errors import AdarankError, AdarankOSError, AdarankPermissionError

PATIENCE = 10  # seconds
_being_made: set[str] = set()  # folders that this process keeps locked until they are whole
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say in one line that `path` cannot be written, whichever library finds out.

    Raises:
        AdarankPermissionError: no right to write there, or a read-only file system.
        AdarankOSError: the disk or the quota is full, a file too large, a name too long.
    """
    try:
        yield
    except AdarankError:
        raise
    except Exception as error:
        number = _error_number(error)
        said = f"cannot write {str(path)!r}: {os.strerror(number)}"
        if number in FORBIDDEN:
            raise AdarankPermissionError(f"{said}; name another place") from error
        if number in FULL:
            raise AdarankOSError(f"{said}; make room or name another place") from error
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Keep other writers from making and renaming things in a folder for a moment.

    Yields:
        False: somebody else keeps it locked, or it cannot be locked.
    """
    if os.path.realpath(folder) in _being_made:
        yield True
        return
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # no right to read it, as opposed to write
        yield False
        return
    try:
        yield lock(opened, PATIENCE) is True
    finally:
        os.close(opened)


def lock(opened: int, seconds: float = 0) -> bool | None:
    """True: locked, until the descriptor is closed. False: somebody else has it. None: no locks."""
    latest = time.monotonic() + seconds
    try:
        while not lock_descriptor(opened, blocking=False):
            if time.monotonic() >= latest:
                return False
            time.sleep(0.002)
    except OSError:
        return None
    return True


@contextmanager
def kept_locked(path: Path) -> Iterator[None]:
    """Lock a new file or folder; in a folder this process goes on writing as `alone_in` it."""
    name = os.path.realpath(path)
    opened = os.open(path, os.O_RDONLY)
    try:
        lock(opened)
        _being_made.add(name)
        yield
    finally:
        _being_made.discard(name)
        os.close(opened)


def write_all(opened: int, data: bytes) -> None:
    """All of it, or OSError: where a disk or a limit ends, `os.write` writes a part and says so."""
    while data:
        data = data[os.write(opened, data) :]


def is_named(path: Path, opened: int) -> bool:
    """Whether `path` is still the name of an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(opened))
    except FileNotFoundError:
        return False


def _error_number(error: Exception) -> int:
    """The system's error number, also from a library's own error; 0: there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    if found := re.search(r"os error (\d+)", str(error)):  # safetensors
        return int(found[1])
    if re.search(r"PytorchStreamWriter|inline_container.*unexpected pos", str(error)):
        return errno.ENOSPC  # torch.save does not say why
    return 0
