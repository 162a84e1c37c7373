"""Rows of each form in TRL's columns, with what was dropped and why. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adarank_fast.errors import AdarankError
from adarank_fast.training.data_files import Table, is_blank, quote
from adarank_fast.training.data_forms import Form

# ShareGPT's names of roles -> those of chat templates
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
Row = dict[str, Any]


@dataclass
class Made:
    """Rows, and what happened to the others."""

    rows: list[Row] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)  # what was left out of chats


def make_rows(table: Table, form: Form, answers: bool) -> Made:
    """The rows of a table, in its form.

    Raises:
        AdarankError: a value of another type; or no row is left.
    """
    for what, column in form.columns.items():
        if form.kinds[column] == "nothing" and all(is_blank(r.get(column)) for r in table.rows):
            if what != "input" and (answers or what != "completion"):
                raise AdarankError(
                    f"{table.name}: the column {column} ({what}) is empty in all "
                    f"{len(table.rows):,} rows; choose another"
                )
    makers = {"labelled": _labelled, "text": _texts, "completion": _completions, "chat": _chats}
    made = makers[form.name](table, form, answers)
    if not made.rows:
        why = ", ".join(f"{count:,} {reason}" for reason, count in made.dropped.items())
        raise AdarankError(f"{table.name}: none of {len(table.rows):,} rows can be used: {why}")
    made.notes += [f"{count:,} {what}" for what, count in made.messages.items()]
    return made


def _texts(table: Table, form: Form, answers: bool) -> Made:
    made = Made()
    for place, row in zip(table.places, table.rows, strict=True):
        text = _text(table, place, row, form.columns["text"])
        if text is None:
            made.dropped["without text"] += not table.plain
        else:
            made.rows.append({"text": text})
    return made


def _labelled(table: Table, form: Form, answers: bool) -> Made:
    made, column = Made(), form.columns["label"]
    names = table.class_names.get(column)
    types: dict[str, tuple[str, object]] = {}  # kind -> where it is first, and the value
    for place, row in zip(table.places, table.rows, strict=True):
        text, label = _text(table, place, row, form.columns["text"]), row.get(column)
        if text is None:
            made.dropped["without text"] += 1
        elif is_blank(label) or names and label == -1:
            made.dropped["without a label"] += 1
        else:
            if isinstance(label, (list, tuple, dict)):
                raise AdarankError(
                    f"{table.name}, {place}: {column} is {quote(label)}; a row has one label, a "
                    "string or a number"
                )
            kind = "a string" if isinstance(label, str) else "true or false"
            kind = "a number" if type(label) in (int, float) else kind
            types.setdefault(kind, (place, label))
            if names and type(label) is int:
                label = names[label]
            made.rows.append({"text": text, "label": label})
    if len(types) > 1:
        said = [f"{value!r} ({place}) is {kind}" for kind, (place, value) in types.items()]
        raise AdarankError(
            f"{table.name}: {column} mixes types: {', '.join(said)}; write all of them alike"
        )
    _name_labels(made)
    counts = Counter(row["label"] for row in made.rows)
    made.classes = list(names or sorted(counts, key=_order(counts)))
    _note_labels(made, counts)
    return made


def _name_labels(made: Made) -> None:
    """Labels as strings: 1.0 of a column of whole numbers is "1"."""
    labels = [str(row["label"]).strip() for row in made.rows]
    halves = [label.rpartition(".") for label in labels]
    if labels and all(whole.lstrip("-").isdigit() and rest == "0" for whole, _, rest in halves):
        labels = [whole for whole, _, _ in halves]
        made.notes.append("labels such as 1.0 are read as 1")
    for row, label in zip(made.rows, labels, strict=True):
        row["label"] = label


def _order(labels: Mapping[str, int]) -> Callable[[str], str | tuple[int, str]]:
    """Whole numbers by value, other names by the alphabet."""
    if all(label.lstrip("-").isdecimal() and label.isascii() for label in labels):
        return lambda label: (int(label), label)
    return str


def _note_labels(made: Made, counts: Mapping[str, int]) -> None:
    seen: dict[str, set[str]] = {}
    for row in made.rows:
        seen.setdefault(row["text"], set()).add(row["label"])
    if several := [text for text, labels in seen.items() if len(labels) > 1]:
        labels = " and ".join(sorted(seen[several[0]])[:3])
        made.notes.append(
            f"{len(several):,} texts have several labels, such as {quote(several[0], 40)!r}: "
            f"{labels}"
        )
    folded: dict[str, list[str]] = {}
    for label in made.classes:
        folded.setdefault(label.casefold(), []).append(label)
    if alike := next((names for names in folded.values() if len(names) > 1), None):
        made.notes.append(f"{' and '.join(alike)} are two classes")
    single = sum(count == 1 for count in counts.values())
    if len(counts) > 2 and 2 * single > len(counts):
        made.notes.append(f"{single:,} of {len(counts):,} classes have one row only")


def _text(table: Table, place: str, row: Mapping[str, object], column: str) -> str | None:
    """A text, None where it is blank."""
    value = row.get(column)
    if is_blank(value):
        return None
    if not isinstance(value, str):
        raise AdarankError(
            f"{table.name}, {place}: {column} must be a string, got {quote(value)}; correct it or "
            "choose another --text-column"
        )
    return value


def _completions(table: Table, form: Form, answers: bool) -> Made:
    made, columns = Made(), form.columns
    kinds: dict[bool, str] = {}
    for place, row in zip(table.places, table.rows, strict=True):
        prompt, completion = row.get(columns["prompt"]), row.get(columns.get("completion", ""))
        if is_blank(prompt) or prompt == []:
            made.dropped["without a prompt"] += 1
            continue
        if answers and (is_blank(completion) or completion == []):
            made.dropped["without a completion"] += 1
            continue
        found: Row = {}
        if isinstance(prompt, list):
            found["prompt"] = _messages(table, place, columns["prompt"], prompt, made)
        else:
            found["prompt"] = str(_text(table, place, row, columns["prompt"]))
            if columns["prompt"].lower().strip() != "prompt":
                extra = _text(table, place, row, columns["input"]) if "input" in columns else None
                found["prompt"] += f"\n\n{extra}\n" if extra else "\n"
        if answers:
            column = columns["completion"]
            if isinstance(completion, list):
                found["completion"] = _messages(table, place, column, completion, made)
            else:
                found["completion"] = str(_text(table, place, row, column))
        chat = {isinstance(value, list) for value in found.values()}
        kinds.setdefault(chat.pop(), place)
        if chat or len(kinds) > 1:
            raise AdarankError(
                f"{table.name}, {place}: texts and lists of messages are mixed; write all prompts "
                "and completions alike"
            )
        made.rows.append(found)
    return made


def _chats(table: Table, form: Form, answers: bool) -> Made:
    made, column = Made(), form.columns["messages"]
    for place, row in zip(table.places, table.rows, strict=True):
        value = row.get(column)
        if is_blank(value) or value == []:
            made.dropped["without messages"] += 1
            continue
        messages = _messages(table, place, column, value, made)
        if answers and not any(one["role"] == "assistant" for one in messages):
            made.dropped["without an assistant's turn"] += 1
        elif not messages:
            made.dropped["without messages"] += 1
        else:
            made.rows.append({"messages": messages})
    if "tools" in table.columns:
        made.notes.append("the column tools is not used")
    return made


def _messages(
    table: Table, place: str, column: str, value: object, made: Made
) -> list[dict[str, str]]:
    """Messages with role and content alone."""
    if not isinstance(value, list):
        raise AdarankError(
            f'{table.name}, {place}: {column} must be a list of {{"role": ..., "content": ...}}, '
            f"got {quote(value)}"
        )
    found = []
    for message, role, content in _turns(table, place, column, value):
        role = ROLES.get(role, role)
        if role in TOOL_ROLES or content is None and message.get("tool_calls"):
            made.messages["messages of tools are left out"] += 1
            continue
        if isinstance(content, list):
            content = _parts(table, place, column, content)
        if not isinstance(content, str):
            raise AdarankError(
                f"{table.name}, {place}: the content of a message in {column} must be a string, "
                f"got {quote(content)}"
            )
        if any(message.get(key) for key in ("reasoning_content", "thinking", "tool_calls")):
            made.messages["messages have more than role and content, which is not used"] += 1
        found.append({"role": role, "content": content})
    return found


def _turns(
    table: Table, place: str, column: str, messages: list[object]
) -> Iterator[tuple[Mapping[str, object], str, object]]:
    """(message, role, content) of each, in either notation."""
    for message in messages:
        for role, content in (("role", "content"), ("from", "value")):
            if isinstance(message, dict) and isinstance(message.get(role), str):
                yield message, message[role], message.get(content)
                break
        else:
            raise AdarankError(
                f'{table.name}, {place}: a message in {column} must be {{"role": ..., "content": '
                f"...}}, got {quote(message)}"
            )


def _parts(table: Table, place: str, column: str, parts: list[Any]) -> str:
    """The text of a content in parts."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise AdarankError(
                f"{table.name}, {place}: a message in {column} has a part that is no text: "
                f"{quote(part)}; drop the row"
            )
    return "\n".join(part["text"] for part in parts)
