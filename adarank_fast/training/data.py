"""Texts from files, and the batches that models take."""

from __future__ import annotations

import csv
import io
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adarank_fast.errors import AdarankError, AdarankFileNotFoundError

TEXT_COLUMNS = (
    *("text", "sentence", "question", "prompt", "content", "document", "review", "query"),
    *("instruction", "input", "body", "utterance", "title"),
)

LABEL_COLUMNS = ("label", "labels", "target", "category", "class", "intent", "label_text")
SUFFIXES = ".jsonl, .ndjson (a JSON object a line), .csv, .tsv, .txt (a text a line)"
Row = tuple[int, Mapping[str, Any]]  # line number, column -> value


@dataclass(frozen=True)
class TextData:
    """Texts, and a label for each if the file has them."""

    texts: list[str]
    labels: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)


def read_texts(
    path: str | os.PathLike[str],
    text_column: str | None = None,
    label_column: str | None = None,
) -> TextData:
    """Read a file of texts; its suffix says how.

    Rows whose text is empty are left out.

    Args:
        path: .jsonl or .ndjson (a JSON object a line), .csv or .tsv with a header line, or .txt (a
            text a line); UTF-8.
        text_column: default: the first of `TEXT_COLUMNS` that the file has, or its only column.
        label_column: default: the first of `LABEL_COLUMNS` that the file has, if any.

    Raises:
        AdarankFileNotFoundError: there is no such file.
        AdarankError: one line that names the file, the line, the value and the remedy.
    """
    path = Path(path)
    text = _read(path)
    kind = path.suffix.lower()
    if kind in (".txt", ".text"):
        for argument, column in (("text_column", text_column), ("label_column", label_column)):
            if column is not None:
                raise AdarankError(
                    f"{path} is plain text and has no columns; leave out {argument}={column!r} or "
                    "use a .jsonl, .csv or .tsv file"
                )
        texts = [line.strip() for line in text.split("\n") if line.strip()]
        labels = None
    elif kind in (".jsonl", ".ndjson", ".csv", ".tsv"):
        lines = _jsonl(path, text) if kind in (".jsonl", ".ndjson") else _csv(path, text)
        texts, labels = _columns(path, list(lines), text_column, label_column)
    else:
        raise AdarankError(f"{path}: unknown suffix {kind!r}; use {SUFFIXES}")
    if not texts:
        raise AdarankError(f"{path} holds no texts; give a file with at least one")
    return TextData(texts, labels)


def _read(path: Path) -> str:
    if not path.exists():
        raise AdarankFileNotFoundError(f"there is no data file {str(path)!r}")
    if path.is_dir():
        raise AdarankError(f"{path} is a folder; name a file in it ({SUFFIXES})")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AdarankError(f"cannot read {path}: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise AdarankError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the "
            f"file, for example with `iconv -f latin1 -t utf-8`"
        ) from None


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 is no line end
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise AdarankError(
                f"{path}, line {number}: not JSON ({error}): {quote(line)}; one object a line"
            ) from None
        if not isinstance(row, dict):
            raise AdarankError(
                f'{path}, line {number}: must be a JSON object such as {{"text": ...}}, got '
                f"{quote(line)}"
            )
        yield number, row


def _csv(path: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:
                raise AdarankError(
                    f"{path}, line {reader.line_num}: {len(row[None]) + len(row) - 1} fields, the "
                    f"header has {len(row) - 1}; quote texts that contain {delimiter!r}"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise AdarankError(f"{path}, line {reader.line_num}: {error}; check the quotes") from None


def _columns(
    path: Path, rows: Sequence[Row], text_column: str | None, label_column: str | None
) -> tuple[list[str], list[str] | None]:
    if not rows:
        return [], None
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    text_column = _choose(path, columns, "text", text_column, TEXT_COLUMNS)
    if text_column is None and len(columns) == 1:
        text_column = columns[0]
    if text_column is None:
        raise AdarankError(
            f"{path} has no column that looks like text; it has {', '.join(columns)}; "
            "say which with text_column"
        )
    label_column = _choose(path, columns, "label", label_column, LABEL_COLUMNS)
    texts, labels = [], []
    for number, row in rows:
        text = _cell(path, number, row, text_column)
        if not isinstance(text, str):
            raise AdarankError(
                f"{path}, line {number}: {text_column} must be a string, got {quote(text)}; "
                "choose another text_column"
            )
        if text.strip():
            texts.append(text)
            if label_column is not None:
                labels.append(str(_cell(path, number, row, label_column)))
    return texts, labels if label_column is not None else None


def _choose(
    path: Path, columns: Sequence[str], what: str, wanted: str | None, usual: Sequence[str]
) -> str | None:
    if wanted is None:
        lower = {column.lower().strip(): column for column in reversed(columns)}
        return next((lower[name] for name in usual if name in lower), None)
    if wanted not in columns:
        raise AdarankError(
            f"{path} has no column {wanted!r} ({what}_column); it has {', '.join(columns)}"
        )
    return wanted


def _cell(path: Path, number: int, row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is None:
        raise AdarankError(
            f"{path}, line {number}: no value for {column}; fill it in or drop the line"
        )
    return value


def quote(value: object, most: int = 60) -> str:
    """A value for a message, cut after `most` characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def hold_out(data: TextData, share: float, seed: int = 0) -> tuple[TextData, TextData]:
    """Split at random into (the rest, `share` of it); equal texts never end on both sides.

    Raises:
        AdarankError: a side would be empty.
    """
    unique = sorted(set(data.texts))
    random.Random(seed).shuffle(unique)
    chosen = set(unique[: round(share * len(unique))])
    if not 0 < len(chosen) < len(unique):
        raise AdarankError(
            f"cannot hold {share:.0%} of {len(unique)} different texts out; give more texts or "
            "held-out data of their own"
        )
    return _where(data, lambda text: text not in chosen), _where(data, lambda text: text in chosen)


def _where(data: TextData, keep: Callable[[str], bool]) -> TextData:
    kept = [index for index, text in enumerate(data.texts) if keep(text)]
    labels = None if data.labels is None else [data.labels[index] for index in kept]
    return TextData([data.texts[index] for index in kept], labels)


@dataclass(frozen=True)
class Data:
    """A file's rows, and what was understood of it.

    Attributes:
        form: "labelled", "text", "completion" or "chat".
        rows: in TRL's columns: text (and label), prompt and completion, or messages.
        classes: names, sorted; empty where there are no labels.
        understood: one line for people.
        texts: of each row; empty for chats and completions.
        labels: of each row, or None.
        task: "classification" or "causal-lm".
    """

    form: str
    rows: list[dict[str, Any]]
    classes: list[str]
    understood: str
    texts: list[str]
    labels: list[str] | None
    task: str


def read_data(
    path: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    task: str = "auto",
) -> Data:
    """Read a file as data of a task; see `read_texts` for formats.

    Args:
        path: .jsonl files may also have prompt and completion, or messages.
        text_column: see `read_texts`.
        label_column: see `read_texts`.
        task: "auto": classification where there are labels, else causal-lm.

    Raises:
        AdarankError: see `read_texts`; or the task does not go with the data.
    """
    path = Path(path)
    if text_column is None and path.suffix.lower() in (".jsonl", ".ndjson"):
        rows = [dict(row) for _, row in _jsonl(path, _read(path))]
        for form, columns in (("chat", ["messages"]), ("completion", ["prompt", "completion"])):
            if rows and all(column in row for row in rows for column in columns):
                if task == "classification":
                    raise AdarankError(f"{path}: {form} data have no labels for classification")
                rows = [{column: row[column] for column in columns} for row in rows]
                said = f"{path}: {len(rows):,} rows, {' and '.join(columns)}"
                return Data(form, rows, [], said, [], None, "causal-lm")
    found = read_texts(path, text_column, label_column)
    labels = None if task == "causal-lm" else found.labels
    if task == "classification" and labels is None:
        raise AdarankError("classification needs labels, the data have none; name their column")
    said = f"{path}: {len(found):,} texts"
    if labels is None and task == "auto" and (others := _other_columns(path, text_column)):
        raise AdarankError(
            f"{path} has columns beside the text and none is called a label: {', '.join(others)}; "
            "say which with label_column (--label-column), or task causal-lm (--task) for none"
        )
    if labels is None:
        rows = [{"text": text} for text in found.texts]
        return Data("text", rows, [], said, found.texts, None, "causal-lm")
    classes = sorted(set(labels))
    rows = [{"text": t, "label": one} for t, one in zip(found.texts, labels, strict=True)]
    said = f"{said} of {len(classes)} classes ({', '.join(classes[:8])})"
    return Data("labelled", rows, classes, said, found.texts, labels, "classification")


def _other_columns(path: Path, text_column: str | None) -> list[str]:
    """Columns that are not the text's."""
    kind = path.suffix.lower()
    if kind in (".txt", ".text"):
        return []
    text = _read(path)
    rows = _jsonl(path, text) if kind in (".jsonl", ".ndjson") else _csv(path, text)
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    chosen = _choose(path, columns, "text", text_column, TEXT_COLUMNS)
    return [column for column in columns if column != chosen] if len(columns) > 1 else []
