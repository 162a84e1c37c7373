"""Finished probes in a file, one line each, so that a killed prediction goes on where it was."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import cast

from adarank_fast.errors import AdarankError
from adarank_fast.file_system import write_all
from adarank_fast.files import lock_file, writing
from adarank_fast.json_values import Value, parse
from adarank_fast.models.identity import Fingerprint, same_output
from adarank_fast.undo import undone_on_error

FORMAT = "adarank-fast checkpoint"
START = json.dumps({"format": FORMAT})[:-1]
OUTPUT = "output on the first batch"  # in the identity: a `fingerprint`

Found = dict[tuple[str, int], float]  # (module name, trial) -> disagreement


class Checkpoint:
    """An append-only file: what was predicted, then a line for each finished probe.

    Lines reach the disk before the next probe begins; a line that a kill cut short is dropped. Each
    process of a distributed run writes a file of its own (`FILE`, `FILE.1`, ...), which it locks,
    and reads all.

    Args:
        path: the file; it need not exist.
        identity: what the probes depend on; JSON values.
        process: number of this process.

    Raises:
        AdarankError: the file is something else, cannot be written, is in use by another
            prediction, or holds the probes of another one.
    """

    def __init__(
        self, path: str | os.PathLike[str], identity: Mapping[str, object], process: int = 0
    ) -> None:
        self._path = Path(path)
        self._identity = json.loads(json.dumps(dict(identity)))
        if not self._path.parent.is_dir():
            raise AdarankError(
                f"checkpoint={str(path)!r}: the folder {str(self._path.parent)!r} does not exist"
            )
        self.found: Found = {}
        own = self._path.with_name(f"{self._path.name}.{process}") if process else self._path
        self._file = -1
        with undone_on_error(self.close):
            self._file = lock_file(own)
            for file in [self._path, *sorted(self._path.parent.glob(f"{self._path.name}.*"))]:
                suffix = file.name[len(self._path.name) + 1 :]
                if file.exists() and (not suffix or suffix.isdigit()):
                    self._read(file)
            self._begin(own)

    def add(self, found: Mapping[tuple[str, int], float]) -> None:
        """Write finished probes; they are on the disk when this returns. NaN is no result.

        Raises:
            AdarankError: they cannot be written; those of before are kept.
        """
        finite = {key: value for key, value in found.items() if math.isfinite(value)}
        lines = (json.dumps([name, trial, value]) for (name, trial), value in finite.items())
        self._write("".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Nothing can be added any more; the next run may have the file."""
        opened, self._file = self._file, -1
        if opened >= 0:
            os.close(opened)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, file: Path) -> None:
        lines = _whole_lines(file)
        remedy = "name another file, or remove this one to begin again"
        try:
            if not lines:  # killed while it wrote the first line?
                begun = file.read_text(encoding="utf-8")
                if not (START.startswith(begun) or begun.startswith(START)):
                    raise ValueError("another first line")
                return
            header = parse(lines[0])
            if (
                not isinstance(header, dict)
                or header["format"] != FORMAT
                or not isinstance(header["identity"], dict)
            ):
                raise ValueError("another format")
            before = dict(header["identity"])
            found = dict(_probe(line) for line in lines[1:])
            differing = [key for key in self._identity if not self._same(key, before)]
        except (ValueError, TypeError, KeyError, OverflowError):
            raise AdarankError(
                f"checkpoint={str(file)!r} is no checkpoint of a prediction; {remedy}"
            ) from None
        for key in differing:
            raise AdarankError(
                f"checkpoint={str(file)!r} holds probes of another prediction ({key}: "
                f"{_short(before.get(key))}, now {_short(self._identity[key])}); {remedy}"
            )
        self.found |= found

    def _same(self, key: str, before: Mapping[str, object]) -> bool:
        """Whether a part of the identity is as it was; outputs are compared but for rounding."""
        if key == OUTPUT and key in before:
            return same_output(
                cast(Fingerprint, before[key]), cast(Fingerprint, self._identity[key])
            )
        return bool(before.get(key) == self._identity[key])

    def _begin(self, own: Path) -> None:
        """Cut the file after its last whole line, and write the first line if there is none."""
        kept = sum(len(line.encode()) + 1 for line in _whole_lines(own))
        with writing(self._path):
            os.ftruncate(self._file, kept)
        if not kept:
            self._write(json.dumps({"format": FORMAT, "identity": self._identity}) + "\n")

    def _write(self, text: str) -> None:
        with writing(self._path):
            write_all(self._file, text.encode())
            os.fsync(self._file)


def _probe(line: str) -> tuple[tuple[str, int], float]:
    name, trial, value = Value(parse(line), "line", "").list()
    return (name.text(), trial.integer()), value.number()


def _whole_lines(file: Path) -> list[str]:
    """All lines but a last one without its end."""
    try:
        return file.read_bytes().decode().split("\n")[:-1]
    except (OSError, UnicodeDecodeError):
        raise AdarankError(f"checkpoint={str(file)!r} is no text file; name another file") from None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
