"""How files are written: whole or not at all, and without touching other people's files.

- One file: `replacing`, `write_text`. What was there stays until the new content is on the disk.
- A folder that appears at once: `new_folder`.
- A folder that a run works in: `own_folder`. It carries our mark. One run at a time has it, and
  that run may remove it: `remove_folder`.
- A file that lines are added to: `lock_file`. One run at a time has it.
- What others write into our folders: `writing` says in one line that the disk is full.

Locks leave no files of their own, and end with the process, however it ends. Where a file system
has no locks, nothing is locked.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from adarank_fast.errors import AdarankError, AdarankFileNotFoundError, AdarankPermissionError
from adarank_fast.file_system import alone_in, is_named, kept_locked, lock, write_all
from adarank_fast.file_system import writing as writing

Name = str | os.PathLike[str]

MARK = ".adarank.json"  # in every folder that is ours
FORMAT = "adarank-fast folder"


@contextmanager
def replacing(path: Name) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error.

    A symbolic link stays one: the file that it names is replaced. A replaced file's permissions are
    kept.

    Raises:
        AdarankError: see `check_file` and `writing`.
    """
    target = check_file(path)
    with writing(path), _temporary(target, _make_file) as temporary:
        yield temporary
        _to_disk(temporary)  # else a crash can leave the new name on an empty file
        _keep_permissions(temporary, target)
        os.replace(temporary, target)


def write_text(path: Name, text: str) -> None:
    """Write a text file with `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: Name, replace: str = "") -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error.

    Args:
        path: not there, or an empty folder.
        replace: a kind of content, such as "adapter". The folder is marked as that, with the names
            of its files, and replaces an older one with the same mark and no other files.

    Raises:
        AdarankError: see `check_folder` and `writing`.
    """
    with alone_in(Path(os.path.realpath(path)).parent):
        target = check_folder(path, replace)
    with writing(path), _temporary(target, os.mkdir) as temporary:
        yield temporary
        if replace:
            mark = {"format": FORMAT, "kind": replace, "files": _files(temporary)}
            (temporary / MARK).write_text(json.dumps(mark), encoding="utf-8")
        for name in _files(temporary):
            _to_disk(temporary / name)
        with alone_in(target.parent):
            check_folder(path, replace)  # something may have been put there meanwhile
            _keep_permissions(temporary, target)
            old = _beside(target, ".old")
            if not replace or not target.exists():
                os.replace(temporary, target)
                return
            os.replace(target, old)  # a rename cannot replace a folder that is not empty
            try:
                os.replace(temporary, target)
            except BaseException:
                os.replace(old, target)
                raise
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def own_folder(path: Name, kind: str, inputs: Iterable[Name] = ()) -> Iterator[Path]:
    """A folder that is ours to add to, to resume and to clear, for one run at a time.

    It is made, parents included, and marked: later runs of the same kind are let in, and they are
    the only ones. Within the block it may be removed, with `remove_folder`.

    Args:
        path: not there, an empty folder, or one with this kind's mark.
        kind: what it holds, such as "comparison".
        inputs: files and folders that the run reads; none may lie in the folder.

    Raises:
        AdarankError: see `check_own_folder` and `writing`; or another run is using the folder.
    """
    inputs = list(inputs)
    while True:
        try:
            with alone_in(Path(os.path.realpath(path)).parent), writing(path):
                folder = check_own_folder(path, kind, inputs)
                folder.mkdir(parents=True, exist_ok=True)
                opened = os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except (FileNotFoundError, FileExistsError):  # removed in between
            continue
        try:
            if lock(opened) is False:
                raise AdarankError(
                    f"folder {str(path)!r} is in use by another run; wait for it or name another"
                )
            if not is_named(folder / MARK, opened):  # removed by the run that had it
                continue
            with writing(path):
                if all(entry.name == MARK for entry in folder.iterdir()):
                    os.ftruncate(opened, 0)  # a full disk may have cut it off
                    write_all(opened, json.dumps({"format": FORMAT, "kind": kind}).encode())
            yield folder
            return
        finally:
            os.close(opened)


def remove_folder(path: Path) -> None:
    """Remove a folder that `own_folder` opened, at once: no other run finds a part of it."""
    gone = _beside(path, ".tmp")
    with writing(path), alone_in(path.parent):
        os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def lock_file(path: Name) -> int:
    """The descriptor of a file to read and to append to, for one run at a time; made if need be.

    The caller closes it. Whether its content is ours is for the caller to judge before it writes.

    Raises:
        AdarankError: see `check_file` and `writing`; or another run is using the file.
    """
    target = check_file(path)
    with writing(path):
        opened = os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        if lock(opened) is False:
            raise AdarankError(
                f"{str(path)!r} is in use by another run; wait for it or name another"
            )
    except BaseException:
        os.close(opened)
        raise
    return opened


def check_file(path: Name, inputs: Iterable[Name] = ()) -> Path:
    """The file that writing to `path` would make or replace.

    Args:
        path: what to write; a symbolic link is followed.
        inputs: files, and folders of files, that are read: none may be replaced. They need not
            exist, as a model that is a name on the hub does not.

    Raises:
        AdarankError: `path` is a folder, a device, or one of the inputs, by whatever name.
        AdarankFileNotFoundError: the folder to make it in does not exist.
        AdarankPermissionError: that folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    with writing(path):
        if target.is_dir():
            raise AdarankError(f"cannot write {str(path)!r}: it is a folder; name a file in it")
        if target.is_symlink() or target.exists() and not target.is_file():
            raise AdarankError(f"cannot write {str(path)!r}: it is no regular file; name another")
        _check_parent(path, target)
        _refuse_inputs(path, [target], inputs)
    return target


def check_folder(path: Name, replace: str = "") -> Path:
    """The folder that `new_folder` would make.

    Raises:
        AdarankError: `path` is a file, or a folder with something in it that may not be replaced.
        AdarankFileNotFoundError: the folder to make it in does not exist.
        AdarankPermissionError: that folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise AdarankError(f"{str(path)!r} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not replace:
            raise AdarankError(f"folder {str(path)!r} is not empty; name a new one")
        mark = _check_mark(path, target, replace)
        ours = mark.get("files")
        if others := set(_files(target)) - {MARK, *(ours if isinstance(ours, list) else ())}:
            raise AdarankError(
                f"folder {str(path)!r} holds {min(others)!r} beside the {replace} to be replaced; "
                "move it or name a new folder"
            )
    _check_parent(path, target)
    return target


def check_own_folder(path: Name, kind: str, inputs: Iterable[Name] = ()) -> Path:
    """The folder that `own_folder` would open, for checks before long work.

    Raises:
        AdarankError: `path` is a file, a folder with something in it and without this kind's mark,
            or holds one of the inputs.
        AdarankPermissionError: it cannot be made or written.
    """
    target = Path(os.path.realpath(path))
    there = next(folder for folder in (target, *target.parents) if folder.exists())
    if not there.is_dir():
        raise AdarankError(f"{str(there)!r} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise AdarankPermissionError(f"folder {str(path)!r} cannot be written; name another")
    if target.is_dir() and any(entry.name != MARK for entry in target.iterdir()):
        _check_mark(path, target, kind)
        _refuse_inputs(path, [target / name for name in _files(target)], inputs)
    return target


def note_settings(folder: Path, settings: Mapping[str, object], holds: str, remedy: str) -> str:
    """Note in `folder` with what settings its content is made; or check that they are the same.

    Args:
        folder: ours; see `own_folder`.
        settings: JSON values; a "date" is noted and not compared.
        holds: what is in it, as "an unfinished run".
        remedy: what to do where the settings differ.

    Returns:
        When they were noted first.

    Raises:
        AdarankError: `folder` `holds` something made with other settings.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        settings = {**settings, "date": settings.get("date", date)}
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return str(settings["date"])
    try:
        before = _read_settings(path)
    except ValueError:
        raise AdarankError(f"{str(path)!r} is damaged; {remedy}") from None
    for key, value in settings.items():
        if key != "date" and before.get(key) != value:
            raise AdarankError(
                f"{str(folder)!r} holds {holds} with {key} = {before.get(key)!r}, now {value!r}; "
                f"{remedy}"
            )
    return str(before.get("date", ""))


def noted_settings_are(folder: Path, settings: Mapping[str, object]) -> bool:
    """Whether `note_settings` noted just these in `folder`, the date aside."""
    try:
        before = _read_settings(folder / "settings.json")
    except (FileNotFoundError, ValueError):
        return False
    now: dict[str, object] = json.loads(json.dumps(settings))
    return before | {"date": None} == now | {"date": None}


def _read_settings(path: Path) -> dict[str, object]:
    """Raises ValueError for what is no JSON object."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(path)
    return found


@contextmanager
def _temporary(target: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """A new file or folder beside `target`, locked, and removed at the end if it is still there."""
    temporary, made = _beside(target, ".tmp"), False
    try:
        with ExitStack() as stack:
            with alone_in(target.parent) as alone:
                if alone:
                    _sweep(target)
                make(temporary)
                made = True
                stack.enter_context(kept_locked(temporary))
            yield temporary
    finally:
        if made:
            _remove(temporary)


def _sweep(target: Path) -> None:
    """Remove what killed writers of `target` left; put back what one had moved away."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    with suppress(OSError):
        for left in [p for p in target.parent.iterdir() if pattern.fullmatch(p.name)]:
            opened = os.open(left, os.O_RDONLY)
            try:
                if left.suffix == ".old" and not target.exists():
                    os.replace(left, target)
                elif lock(opened):  # nobody writes it
                    _remove(left)
            finally:
                os.close(opened)


def _make_file(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def _keep_permissions(temporary: Path, target: Path) -> None:
    with suppress(FileNotFoundError):
        before = target.stat()
        with suppress(PermissionError):  # only root may give files away
            os.chown(temporary, before.st_uid, before.st_gid)
        temporary.chmod(stat.S_IMODE(before.st_mode))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{suffix}")


def _files(folder: Path) -> list[str]:
    """Names of all files in it and beneath."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()]


def _check_mark(path: Name, folder: Path, kind: str) -> dict[str, object]:
    """The folder's mark; refused if it is none of ours, or of another kind."""
    try:
        mark = dict(json.loads((folder / MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        mark = {}
    if mark.get("format") != FORMAT:
        raise AdarankError(
            f"folder {str(path)!r} is not empty and adarank-fast did not make it; name a new one"
        )
    if mark.get("kind") != kind:
        raise AdarankError(
            f"folder {str(path)!r} is of another kind ({mark.get('kind')}, not {kind}); "
            "name a new one"
        )
    return mark


def _check_parent(path: Name, target: Path) -> None:
    if not target.parent.is_dir():
        raise AdarankFileNotFoundError(
            f"cannot write {str(path)!r}: its folder does not exist; make it"
        )
    if not os.access(target.parent, os.W_OK):
        raise AdarankPermissionError(f"cannot write {str(path)!r}: its folder cannot be written")


def _refuse_inputs(path: Name, outputs: Iterable[Path], inputs: Iterable[Name]) -> None:
    outputs = list(outputs)
    for given in map(Path, inputs):
        for one in given.iterdir() if given.is_dir() else [given]:
            if any(_is_same_file(one, output) for output in outputs):
                raise AdarankError(
                    f"cannot write {str(path)!r}: {str(one)!r} is read from there; name another"
                )


def _is_same_file(one: Path, other: Path) -> bool:
    """Whether both are names of one file: the same name, or linked."""
    if one.exists() and other.exists():
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)
