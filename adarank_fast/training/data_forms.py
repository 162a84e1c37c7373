"""Which form a table has, and what its columns are. Asks where a guess could be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, SupportsFloat, TypeGuard

from adarank_fast.errors import AdarankError
from adarank_fast.training.data_files import Table, is_blank

TEXT_COLUMNS = (
    *("text", "sentence", "question", "prompt", "content", "document", "review", "query"),
    *("instruction", "input", "body", "utterance", "title", "comment", "message", "tweet"),
)
LABEL_COLUMNS = (
    *("label", "labels", "target", "category", "class", "intent", "label_text", "sentiment"),
    *("emotion", "polarity", "rating", "stars", "topic", "tag", "label_name", "class_name"),
    *("spam", "is_spam", "toxic", "stance"),
)
CHATS = ("messages", "conversations", "conversation")
# prompt -> what answers it, and what belongs to the prompt
COMPLETIONS = {
    "prompt": (("completion", "response", "output"), ()),
    "instruction": (("output", "response", "completion"), ("input", "context")),
    "question": (("answer", "response"), ()),
    "query": (("response", "answer"), ()),
    "problem": (("solution", "answer"), ()),
    "input": (("output",), ()),
}
SAMPLE = 5000  # rows that are looked at to see what a column holds


@dataclass(frozen=True)
class Form:
    """What a table is.

    Attributes:
        name: "labelled", "text", "completion" or "chat".
        columns: what (text, label, prompt, input, completion, messages) -> the column.
        kinds: column -> what it holds; see `kind_of`.
        notes: what was assumed.
    """

    name: str
    columns: dict[str, str]
    kinds: dict[str, str]
    notes: list[str] = field(default_factory=list)


def recognise(
    table: Table, text_column: str | None, label_column: str | None, task: str, answers: bool
) -> Form:
    """The form of a table.

    Args:
        table: its columns are looked at by name and by content.
        text_column: of the texts, where the user says it.
        label_column: of the labels, likewise.
        task: "auto", "classification" or "causal-lm".
        answers: whether labels, completions and answers of chats are wanted.

    Raises:
        AdarankError: it could be several; the line names the option that decides.
    """
    if table.plain:
        for option, column in (("--text-column", text_column), ("--label-column", label_column)):
            if column is not None:
                raise AdarankError(
                    f"{table.name} is plain text and has no columns; leave out {option} {column} "
                    "or use a .jsonl, .csv or .tsv file"
                )
        if task == "classification" and answers:
            raise AdarankError(
                f"{table.name} is plain text, classification needs labels; use a .csv with a text "
                "and a label column"
            )
        return Form("text", {"text": "text"}, {"text": "text"})
    for option, column in (("--text-column", text_column), ("--label-column", label_column)):
        if column is not None and column not in table.columns:
            raise AdarankError(
                f"{table.name} has no column {column!r} ({option}); it has {_list(table.columns)}"
            )
    if text_column is not None and text_column == label_column:
        raise AdarankError(f"--text-column and --label-column are both {text_column!r}")
    if label_column is not None and task == "causal-lm":
        raise AdarankError(
            f"--label-column {label_column} is for classification, the task is causal-lm; leave "
            "one of them out"
        )
    kinds = {column: kind_of(_values(table, column)) for column in table.columns}
    named = _Names(table.columns)
    if text_column is None and label_column is None and task != "classification":
        found = _dialogue(table, named, kinds, task, answers)
        if found is not None:
            return found
    _refuse_missing_header(table, named, kinds)
    text = text_column or _text(table, named, kinds, {label_column})
    columns = {"text": text}
    label = label_column
    if label is None and answers and task != "causal-lm":
        label = _label(table, named, kinds, text, task)
    if not answers or label is None:
        return Form("text", columns, kinds)
    return Form("labelled", {**columns, "label": label}, kinds)


class _Names(dict[str, str]):
    """Columns by their names in lower case."""

    def __init__(self, columns: Iterable[str]) -> None:
        super().__init__({str(one).lower().strip(): one for one in reversed(list(columns))})

    def those(self, usual: Iterable[str]) -> list[str]:
        return [self[name] for name in usual if name in self]


def kind_of(values: Sequence[object]) -> str:
    """What a column holds: text, label (few values, repeated), short, number, nested or nothing.

    "short" are strings that are neither, such as names, dates and identifiers.
    """
    present = [value for value in values if not is_blank(value)]
    if not present:
        return "nothing"
    if any(isinstance(value, (list, dict, tuple)) for value in present):
        return "nested"
    different = len({str(value) for value in present})
    repeated = len(present) >= 4 and different <= min(200, len(present) // 2)
    numbers = [float(value) for value in present if _is_number(value)]
    if len(numbers) == len(present):
        whole = all(number.is_integer() for number in numbers)
        return "label" if repeated and (whole or different <= 10) else "number"
    texts = [str(value).strip() for value in present]
    if repeated and max(map(len, texts)) <= 60:
        return "label"
    words = sum(len(text.split()) for text in texts) / len(texts)
    letters = sum(map(len, texts)) / len(texts)
    unspaced = sum(text.isascii() for text in texts) < len(texts) / 2 and letters >= 8
    return "text" if words >= 2.5 or unspaced else "short"


def _is_number(value: object) -> TypeGuard[str | SupportsFloat]:
    try:
        return isinstance(value, (str, SupportsFloat)) and abs(float(value)) < float("inf")
    except (TypeError, ValueError, OverflowError):
        return False


def _values(table: Table, column: str) -> list[object]:
    step = max(len(table.rows) // SAMPLE, 1)  # evenly spaced: files are often sorted
    return [row.get(column) for row in table.rows[::step]]


def _list(columns: Sequence[str]) -> str:
    return ", ".join(str(column) or "(no name)" for column in columns)


def _ask(table: Table, what: str, options: str) -> NoReturn:
    raise AdarankError(f"{table.name}: {what}; {options}")


def _dialogue(
    table: Table, named: _Names, kinds: Mapping[str, str], task: str, answers: bool
) -> Form | None:
    """Chats, or prompts with completions."""
    if chats := [one for one in named.those(CHATS) if kinds[one] == "nested"]:
        return _unlabelled(table, named, Form("chat", {"messages": chats[0]}, dict(kinds)), task)
    if "chosen" in named and "rejected" in named and answers:
        _ask(
            table,
            "it has preferences (chosen, rejected), which a preference trainer takes",
            "give prompt and completion, messages or text; or --text-column chosen",
        )
    for prompt, (completions, inputs) in COMPLETIONS.items():
        found = [one for one in named.those(completions) if one != named.get(prompt)]
        if prompt not in named or not (found or not answers and not named.those(LABEL_COLUMNS)):
            continue
        columns = {"prompt": named[prompt]}
        if extra := named.those(inputs):
            columns["input"] = extra[0]
        if found:
            columns["completion"] = found[0]
        elif "text" in named:
            continue  # that is what a language model goes on with
        exact = prompt == "prompt"
        answer = found[0] if found else ""
        if task == "auto" and answers and not exact and kinds.get(answer) == "label":
            if prompt in ("question", "query"):
                _ask(
                    table,
                    f"{answer} could be a label or a completion: it has few different values",
                    f"say --label-column {answer}, or --task causal-lm for completions",
                )
        notes = []
        if not exact:
            joined = f"{columns['prompt']} and {columns['input']}" if extra else columns["prompt"]
            notes.append(f"the prompt is {joined}, then a line break")
        return _unlabelled(table, named, Form("completion", columns, dict(kinds), notes), task)
    return None


def _unlabelled(table: Table, named: _Names, form: Form, task: str) -> Form:
    """A form without labels, unless there are labels beside it."""
    labels = [one for one in named.those(("label", "labels")) if form.kinds[one] == "label"]
    if labels and task == "auto":
        _ask(
            table,
            f"it has {' and '.join(form.columns.values())}, and {labels[0]}, which could be labels",
            f"say --task causal-lm to learn the {form.name}, or --label-column {labels[0]} (and "
            "--text-column) to classify",
        )
    return form


def _refuse_missing_header(table: Table, named: _Names, kinds: Mapping[str, str]) -> None:
    if not table.places[0].startswith("line") or named.those((*TEXT_COLUMNS, *LABEL_COLUMNS)):
        return
    repeated = [c for c in table.columns if kinds[c] == "label" and c in _values(table, c)]
    if repeated or any(len(column.split()) >= 4 for column in table.columns):
        _ask(
            table,
            f"line 1 looks like data, not like names of columns ({_list(table.columns)[:60]})",
            "put a line of names first, such as text,label",
        )


def _text(table: Table, named: _Names, kinds: Mapping[str, str], taken: set[str | None]) -> str:
    usual = [one for one in named.those(TEXT_COLUMNS) if one not in taken]
    usual = [one for one in usual if kinds[one] != "nested"]
    if "text" in named and named["text"] in usual:
        return named["text"]
    labels = named.those(LABEL_COLUMNS)
    others = [c for c in table.columns if kinds[c] == "text" and c not in labels and c not in taken]
    found = list(dict.fromkeys([*usual, *others]))
    if len(found) > 1:  # a column of that name with numbers in it is none
        found = [one for one in found if kinds[one] not in ("number", "nothing")] or found
    if not found and len(table.columns) == 1 and kinds[table.columns[0]] != "nested":
        found = list(table.columns)
    if len(found) == 1:
        return found[0]
    if not found:
        _ask(
            table,
            f"no column looks like text; it has {_list(table.columns)}",
            "say which with --text-column",
        )
    _ask(
        table,
        f"the text could be any of {_list(found)}",
        f"say which with --text-column, such as --text-column {found[0]}",
    )


def _label(
    table: Table, named: _Names, kinds: Mapping[str, str], text: str, task: str
) -> str | None:
    usual = [one for one in named.those(LABEL_COLUMNS) if one != text]
    exact = [one for one in named.those(("label", "labels")) if one in usual]
    like = [one for one in table.columns if kinds[one] == "label" and one != text]
    others = [one for one in like if one not in usual]
    lm = ", or --task causal-lm for none" if task == "auto" else ""
    if not exact and len(usual) > 1:
        usual = [one for one in usual if kinds[one] == "label"] or usual
    if exact or len(usual) == 1:
        chosen = (exact or usual)[0]
        if task == "auto":
            _ask_if_many(table, chosen)
        return chosen
    if usual:
        _ask(table, f"the label could be any of {_list(usual)}", f"say --label-column{lm}")
    if task == "classification" and len(others) == 1:
        return others[0]
    if others:
        could = "could be the label" if len(others) == 1 else "could be labels"
        _ask(table, f"{_list(others)} {could}", f"say --label-column {others[0]}{lm}")
    if task == "classification":
        _ask(
            table,
            f"classification needs labels, and none of {_list(table.columns)} looks like them",
            "say which with --label-column",
        )
    return None


def _ask_if_many(table: Table, column: str) -> None:
    values = [row.get(column) for row in table.rows]
    present = [str(value) for value in values if not is_blank(value)]
    different = len(set(present))
    if different > 5 and 2 * different > len(present):
        _ask(
            table,
            f"{column} has {different:,} different values in {len(present):,} rows, many for "
            "classes",
            f"say --label-column {column} if they are, another --label-column, or --task causal-lm",
        )
