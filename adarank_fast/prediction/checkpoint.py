"""Finished probes in a file, one line each, so that a killed prediction goes on where it was."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from adarank_fast.errors import AdarankError
from adarank_fast.json_values import Value, parse

FORMAT = "adarank-fast checkpoint"
START = json.dumps({"format": FORMAT})[:-1]

Found = dict[tuple[str, int], float]  # (module name, trial) -> disagreement


class Checkpoint:
    """An append-only file: what was predicted, then a line for each finished probe.

    Lines reach the disk before the next probe begins; a line that a kill cut short is dropped. Each
    process of a distributed run writes a file of its own (`FILE`, `FILE.1`, ...) and reads all.

    Args:
        path: the file; it need not exist.
        identity: what the probes depend on; JSON values.
        process: number of this process.

    Raises:
        AdarankError: the file is something else, or holds the probes of another prediction.
    """

    def __init__(
        self, path: str | os.PathLike[str], identity: Mapping[str, Any], process: int = 0
    ) -> None:
        self._path = Path(path)
        self._identity = json.loads(json.dumps(dict(identity)))
        if not self._path.parent.is_dir():
            raise AdarankError(
                f"checkpoint={str(path)!r}: the folder {str(self._path.parent)!r} does not exist"
            )
        self.found: Found = {}
        for file in [self._path, *sorted(self._path.parent.glob(f"{self._path.name}.*"))]:
            suffix = file.name[len(self._path.name) + 1 :]
            if file.exists() and (not suffix or suffix.isdigit()):
                self._read(file)
        own = self._path.with_name(f"{self._path.name}.{process}") if process else self._path
        self._file = self._open(own)

    def add(self, found: Mapping[tuple[str, int], float]) -> None:
        """Write finished probes; they are on the disk when this returns. NaN is no result."""
        finite = {key: value for key, value in found.items() if math.isfinite(value)}
        lines = (json.dumps([name, trial, value]) for (name, trial), value in finite.items())
        self._file.write("".join(f"{line}\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

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
            if header["format"] != FORMAT or not isinstance(header["identity"], dict):
                raise ValueError("another format")
            found = dict(_probe(line) for line in lines[1:])
        except (ValueError, TypeError, KeyError):
            raise AdarankError(
                f"checkpoint={str(file)!r} is no checkpoint of a prediction; {remedy}"
            ) from None
        for key, value in self._identity.items():
            if header["identity"].get(key) != value:
                raise AdarankError(
                    f"checkpoint={str(file)!r} holds probes of another prediction ({key}: "
                    f"{_short(header['identity'].get(key))}, now {_short(value)}); {remedy}"
                )
        self.found |= found

    def _open(self, file: Path) -> Any:
        """The file, opened for appending after its last whole line."""
        try:
            kept = sum(len(line.encode()) + 1 for line in _whole_lines(file))
            with open(file, "ab") as opened:
                opened.truncate(kept)
            handle = open(file, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise AdarankError(
                f"checkpoint={str(file)!r} cannot be written: {error.strerror}"
            ) from error
        if not kept:
            handle.write(json.dumps({"format": FORMAT, "identity": self._identity}) + "\n")
        return handle


def _probe(line: str) -> tuple[tuple[str, int], float]:
    name, trial, value = Value(parse(line), "line", "").list()
    return (name.text(), trial.integer()), value.number()


def _whole_lines(file: Path) -> list[str]:
    """All lines but a last one without its end."""
    if not file.exists():
        return []
    try:
        return file.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError):
        raise AdarankError(f"checkpoint={str(file)!r} is no text file; name another file") from None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
