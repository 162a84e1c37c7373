"""The one reader of data for all commands, and a summary of how it understood them."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from adarank_fast.errors import AdarankError
from adarank_fast.options import TASKS, check_choice
from adarank_fast.training.data_files import is_blank, quote, read_table
from adarank_fast.training.data_forms import recognise
from adarank_fast.training.data_rows import Row, make_rows

SHOWN = 8  # classes and columns in a line


@dataclass(frozen=True)
class Understood:
    """What was understood of data.

    Attributes:
        source: the file, folder or name.
        rows: how many were read.
        used: rows that are left.
        form: see `Data`.
        task: "classification" or "causal-lm".
        columns: what (text, label, prompt, input, completion, messages) -> the column.
        classes: their names, and rows of each.
        dropped: why -> rows.
        unused: columns; those that hold texts have " (text)" after their names.
        notes: what was assumed, or looks wrong.
    """

    source: str
    rows: int
    used: int
    form: str
    task: str
    columns: dict[str, str] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Plain sentences for people."""
        columns = [f"{what} is column {column}" for what, column in self.columns.items()]
        found = [f"{self.source}: {_count(self.rows, 'row')}; {', '.join(columns) or 'plain text'}"]
        if self.form == "labelled":
            names = [f"{quote(name, 40)} ({rows:,})" for name, rows in self.classes.items()]
            found.append(f"task classification, {len(names)} classes: {_some(names)}")
        else:
            what = {"text": "texts without labels", "chat": "chats"}
            found.append(f"task causal-lm: {what.get(self.form, 'prompts and completions')}")
        if self.dropped:
            why = [f"{count:,} {reason}" for reason, count in self.dropped.items()]
            found.append(f"dropped {_count(self.rows - self.used, 'row')}: {', '.join(why)}")
        if self.unused:
            found.append(f"unused columns: {_some(self.unused)}")
        return found + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def as_json(self) -> dict[str, object]:
        """The attributes, for `--json`."""
        return asdict(self)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _some(names: Sequence[str]) -> str:
    more = f", ... ({len(names):,} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@dataclass(frozen=True)
class Data:
    """Rows of one form, and what was understood.

    Attributes:
        form: "labelled", "text", "completion" or "chat".
        rows: in TRL's columns: text (and label, a string); prompt and completion, both strings or
            both lists of messages; or messages, each with role and content.
        classes: names in a fixed order: a dataset's own, else numbers by value, else the
            alphabet's; empty unless labelled.
        understood: what was read and how.
    """

    form: str
    rows: list[Row]
    classes: list[str]
    understood: Understood

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        """Of each row; empty for completions and chats."""
        return [row["text"] for row in self.rows if "text" in row]

    @property
    def labels(self) -> list[str] | None:
        """Of each row; None unless labelled."""
        return [row["label"] for row in self.rows] if self.form == "labelled" else None

    @property
    def task(self) -> str:
        """What the data are for: "classification" with labels, else "causal-lm"."""
        return "classification" if self.form == "labelled" else "causal-lm"


def read_data(
    path: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    task: str = "auto",
    answers: bool = True,
) -> Data:
    """Read data and say how they were understood; see docs/data.md for the formats.

    Args:
        path: a .jsonl, .json, .csv, .tsv, .txt or .parquet file, also as .gz; a folder of
            `datasets`' save_to_disk; or a name of the hub, `name:split`.
        text_column: of the texts; found by name and content if left out.
        label_column: of the labels, likewise.
        task: "auto": classification where there are labels, else causal-lm.
        answers: whether labels, completions and answers are wanted; without them rows have the
            text, the prompt, or messages that need not be answered.

    Raises:
        AdarankFileNotFoundError: there is no such file.
        AdarankError: one line that names the file, the place, the value and the remedy; where a
            guess could be wrong, the option that decides.
    """
    check_choice("task", task, ("auto", *TASKS))
    table = read_table(path)
    form = recognise(table, text_column, label_column, task, answers)
    made = make_rows(table, form, answers)
    counts = Counter(row.get("label") for row in made.rows)
    # without answers, their columns are skipped but not listed as unused
    unused = [column for column in table.columns if column not in form.columns.values()]
    understood = Understood(
        source=table.name,
        rows=len(table.rows),
        used=len(made.rows),
        form=form.name,
        task="classification" if form.name == "labelled" else "causal-lm",
        columns={} if table.plain else form.columns,
        classes={name: counts[name] for name in made.classes},
        dropped=dict(+made.dropped),
        unused=[
            (column or "(no name)") + " (text)" * (form.kinds[column] == "text")
            for column in unused
        ],
        notes=[*table.notes, *form.notes, *made.notes],
    )
    return Data(form.name, made.rows, made.classes, understood)


def as_data(rows: Sequence[Any], source: str = "the data") -> Data | None:
    """Texts, or (text, label) pairs, as data; None if they are neither.

    Raises:
        AdarankError: a label is blank or of another type than the others.
    """
    if rows and all(isinstance(row, str) for row in rows):
        made, form = [{"text": text} for text in rows], "text"
    elif rows and all(isinstance(row, (tuple, list)) and len(row) == 2 for row in rows):
        made, form = [{"text": text, "label": str(label)} for text, label in rows], "labelled"
        for number, (text, label) in enumerate(rows):
            if not isinstance(text, str) or is_blank(label):
                raise AdarankError(
                    f"{source}, item {number}: must be a text and a label, got "
                    f"{quote((text, label))}"
                )
    else:
        return None
    counts = Counter(row.get("label", "") for row in made)
    classes = {label: counts[label] for label in sorted(counts)} if form == "labelled" else {}
    task = "classification" if classes else "causal-lm"
    understood = Understood(source, len(made), len(made), form, task, classes=classes)
    return Data(form, made, list(classes), understood)


def for_task(data: Data, task: str) -> Data:
    """The data as a task wants them: without labels for a language model.

    Raises:
        AdarankError: classification, and there are no labels.
    """
    check_choice("task", task, ("auto", *TASKS))
    if task == "classification" and data.form != "labelled":
        raise AdarankError(
            f"classification needs labels, {data.understood.source} has none; name their column "
            "with --label-column"
        )
    if task != "causal-lm" or data.form != "labelled":
        return data
    understood = replace(data.understood, form="text", task=task, classes={})
    return Data("text", [{"text": text} for text in data.texts], [], understood)


def check_alike(data: Data, held_out: Data) -> None:
    """Refuse evaluation data that are not like the training data.

    Raises:
        AdarankError: another form; or a label that no training row has.
    """
    if data.form != held_out.form:
        raise AdarankError(
            f"the training data are {data.form}, the evaluation data {held_out.form}; give both "
            "in one form"
        )
    if unknown := sorted(set(held_out.labels or ()) - set(data.classes)):
        raise AdarankError(
            f"the evaluation data have a label {quote(unknown[0])!r} that the training data do not "
            "have; correct it or drop those rows"
        )


def hold_out(data: Data, share: float, seed: int = 0) -> tuple[Data, Data]:
    """Split at random into (the rest, `share` of it); equal inputs never end on both sides.

    Raises:
        AdarankError: a side would be empty.
    """
    keys = [_input(row) for row in data.rows]
    unique = sorted(set(keys))
    random.Random(seed).shuffle(unique)
    chosen = set(unique[: round(share * len(unique))])
    if not 0 < len(chosen) < len(unique):
        raise AdarankError(
            f"cannot hold {share:.0%} of {len(unique)} different texts out; give more texts or "
            "held-out data of their own"
        )
    pairs = list(zip(data.rows, keys, strict=True))
    kept = [row for row, key in pairs if key not in chosen]
    held = [row for row, key in pairs if key in chosen]
    return replace(data, rows=kept), replace(data, rows=held)


def _input(row: Row) -> str:
    """What the model gets of a row."""
    value = next(row[key] for key in ("text", "prompt", "messages") if key in row)
    return value if isinstance(value, str) else json.dumps(value)
