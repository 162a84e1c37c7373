"""What people bring: formats, forms, what is dropped, and what is asked."""

from __future__ import annotations

import gzip
import json
import zipfile

import pandas
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from adarank_fast.errors import AdarankError
from adarank_fast.training.data import as_data, check_alike, for_task, hold_out, read_data

REVIEWS = [("I liked it a lot", "good"), ("a film for nobody at all", "bad")] * 4


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8", newline="")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", '{"id": 7, "sentence": "one"}\n\n{"sentence": "two, \\u2028three"}\n'),
        ("a.json", '[{"sentence": "one"}, {"sentence": "two, \\u2028three"}]'),
        ("a.json", '{"sentence": "one"}\n{"sentence": "two, \\u2028three"}'),
        ("a.csv", 'id,Sentence\r\n7,one\r\n8,"two, \u2028three"\r\n'),
        ("a.csv", "id;sentence\n7;one\n8;two, \u2028three\n"),
        ("a.TSV", "\ufeffsentence\tid\none\t7\ntwo, \u2028three\t8\n"),
        ("a.txt", "one\r\n  \r\ntwo, \u2028three"),
        ("only.csv", 'whatever\none\n"two, \u2028three"\n'),
        ("empty_rows.jsonl", '{"text": " "}\n{"text": "one"}\n{"text": "two, \u2028three"}'),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_format(tmp_path, name, content, packed):
    path = write(tmp_path / name, content)
    if packed:
        path = write(tmp_path / f"{name}.gz", gzip.compress(path.read_bytes()))
    data = read_data(path)
    assert data.texts == ["one", "two, \u2028three"]
    assert (data.form, data.labels, data.task, len(data)) == ("text", None, "causal-lm", 2)


def test_tables_of_other_libraries(tmp_path):
    frame = pandas.DataFrame({"text": ["a", "b", None, "c"], "label": [1.0, 0.0, 1.0, None]})
    frame.to_parquet(tmp_path / "a.parquet")
    data = read_data(tmp_path / "a.parquet")
    assert data.rows == [{"text": "a", "label": "1"}, {"text": "b", "label": "0"}]
    assert data.understood.dropped == {"without text": 1, "without a label": 1}

    features = Features({"text": Value("string"), "label": ClassLabel(names=["worse", "better"])})
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
    data = read_data(tmp_path / "saved" / "train")
    assert (data.classes, data.labels) == (["worse", "better"], ["better", "worse"])
    with pytest.raises(AdarankError, match="has the splits train; name one: .*saved/train"):
        read_data(tmp_path / "saved")


def test_text_in_several_lines_and_long(tmp_path):
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", f'text,label\n"two\nlines",p\n{long},q\n')
    assert read_data(path).texts == ["two\nlines", long]


def test_what_was_understood(tmp_path):
    rows = "".join(f"{i},{text},{mood},plot number {i} told\n" for i, (text, mood) in IDS)
    path = write(tmp_path / "reviews.csv", f"id,review,sentiment,plot\n{rows}8, ,bad,\n9,so,,\n")
    with pytest.raises(AdarankError, match="could be any of review, plot; say .* --text-column"):
        read_data(path)
    data = read_data(path, text_column="review")
    assert data.classes == ["bad", "good"]
    assert data.understood.lines() == [
        f"{path}: 10 rows; text is column review, label is column sentiment",
        "task classification, 2 classes: bad (4), good (4)",
        "dropped 2 rows: 1 without text, 1 without a label",
        "unused columns: id, plot (text)",
    ]
    assert json.loads(json.dumps(data.understood.as_json()))["used"] == 8
    assert read_data(path, text_column="plot", task="causal-lm").form == "text"
    assert read_data(path, text_column="review", answers=False).form == "text"


IDS = list(enumerate(REVIEWS))


def test_labels(tmp_path):
    lines = [
        {"text": t, "label": n, "topic": x}
        for t, n, x in zip("abc", (10, 2, 2), "xyy", strict=True)
    ]
    path = write(tmp_path / "a.jsonl", lines)
    data = read_data(path)
    assert (data.labels, data.classes) == (["10", "2", "2"], ["2", "10"])
    assert read_data(path, label_column="topic").labels == ["x", "y", "y"]
    assert read_data(path, text_column="topic").texts == ["x", "y", "y"]
    assert read_data(path, task="causal-lm").labels is None
    path = write(tmp_path / "a.csv", "text,label\nsame, Bad\nsame,bad\nother,good\n")
    notes = read_data(path).understood.notes
    assert notes[0] == "1 texts have several labels, such as 'same': Bad and bad"
    assert notes[1] == "Bad and bad are two classes"


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ASKED, ANSWERED = turn("user", "What is it?"), turn("assistant", "A cat.")
QA = {"prompt": "What is it?\n", "completion": "A cat."}
DIALOGUES = {
    "completion": ([{"prompt": "What is it?\n", "completion": "A cat."}], QA),
    "question": ([{"question": "What is it?", "answer": "A cat.", "id": 3}], QA),
    "instruction": ([{"instruction": "What is it?", "input": "", "output": "A cat."}], QA),
    "input": (
        [{"instruction": "Say it.", "input": "cat", "output": "A cat."}],
        {"prompt": "Say it.\n\ncat\n", "completion": "A cat."},
    ),
    "chat completion": (
        [{"prompt": [ASKED], "completion": [ANSWERED]}],
        {"prompt": [ASKED], "completion": [ANSWERED]},
    ),
    "chat": (
        [{"messages": [ASKED, ANSWERED], "tools": None}],
        {"messages": [ASKED, ANSWERED]},
    ),
    "parts": (
        [{"messages": [turn("user", [{"type": "text", "text": "What is it?"}]), ANSWERED]}],
        {"messages": [ASKED, ANSWERED]},
    ),
    "sharegpt": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "What is it?"},
                    {"from": "gpt", "value": "A cat."},
                ]
            }
        ],
        {"messages": [ASKED, ANSWERED]},
    ),
    "tools": (
        [
            {
                "messages": [
                    ASKED,
                    turn("assistant", None, tool_calls=[1]),
                    turn("tool", "x"),
                    ANSWERED,
                ]
            }
        ],
        {"messages": [ASKED, ANSWERED]},
    ),
    "unanswered": (
        [{"messages": [ASKED]}, {"messages": []}, {"messages": [ASKED, ANSWERED]}],
        {"messages": [ASKED, ANSWERED]},
    ),
}


@pytest.mark.parametrize("case", DIALOGUES)
def test_dialogues(tmp_path, case):
    rows, expected = DIALOGUES[case]
    data = read_data(write(tmp_path / "a.jsonl", rows))
    assert data.rows == [expected]
    assert data.form == ("chat" if "messages" in expected else "completion")
    assert data.task == "causal-lm" and not data.texts
    said = "\n".join(data.understood.lines())
    for part in {
        "tools": ["2 messages of tools are left out"],
        "unanswered": ["dropped 2 rows: 1 without an assistant's turn, 1 without messages"],
        "chat": ["tools is not used"],
        "question": ["the prompt is question, then a line break", "unused columns: id"],
    }.get(case, []):
        assert part in said


def test_without_answers(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [ASKED]}])
    with pytest.raises(AdarankError, match="none of 1 rows can be used: 1 without an assistant"):
        read_data(path)
    assert read_data(path, answers=False).rows == [{"messages": [ASKED]}]
    path = write(tmp_path / "b.jsonl", [{"instruction": "Say it.", "input": "cat"}])
    assert read_data(path, answers=False).rows == [{"prompt": "Say it.\n\ncat\n"}]
    path = write(tmp_path / "q.csv", "question\nWhat is it?\n")  # as with answers beside them
    assert read_data(path, task="causal-lm", answers=False).rows == [{"prompt": "What is it?\n"}]
    path = write(tmp_path / "c.csv", "question,label\nwhat is it,\nwho are you,\n")
    data = read_data(path, task="classification", answers=False)
    assert data.texts == ["what is it", "who are you"] and data.form == "text"


def test_hold_out_keeps_equal_texts_together():
    data = as_data([(f"t{i % 10}", i) for i in range(40)])
    rest, held = hold_out(data, 0.2)
    assert len(held) == 8 and len(rest) == 32
    assert not set(rest.texts) & set(held.texts)
    kept = set(held.texts)
    assert held.labels == [str(i) for i in range(40) if f"t{i % 10}" in kept]


def test_data_of_a_script():
    data = as_data([("x", 1), ("y", 0)])
    assert for_task(data, "causal-lm").rows == [{"text": "x"}, {"text": "y"}]
    assert for_task(data, "classification") is data
    assert as_data([{"input_ids": [1]}]) is None
    with pytest.raises(AdarankError, match="needs labels"):
        for_task(as_data(["x"]), "classification")
    with pytest.raises(AdarankError, match="item 1: must be a text and a label"):
        as_data([("x", 1), ("y", None)])
    with pytest.raises(AdarankError, match="a label '7' that the training data do not"):
        check_alike(data, as_data([("x", 7)]))
    with pytest.raises(AdarankError, match="are labelled, the evaluation data text"):
        check_alike(data, as_data(["x"]))


def zipped(name):
    def make(path):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, "text")

    return make


MANY = [{"text": f"word number {i}", "label": f"class {i}"} for i in range(30)]
YES_NO = [{"question": f"is it number {i}", "answer": "yes" if i % 2 else "no"} for i in range(8)]
SOURCES = [{"text": f"word number {i}", "source": "web"} for i in range(8)]
BAD = {
    "no such file": ("missing.txt", None, {}, "there is no data file .*missing.txt"),
    "suffix": ("a.bin", b"x", {}, "unknown suffix '.bin'; use .jsonl"),
    "empty": ("a.txt", "\n \n", {}, "holds no rows"),
    "empty csv": ("a.csv", "", {}, "holds no rows"),
    "header only": ("a.csv", "text,label\n", {}, "holds no rows"),
    "bytes": ("a.txt", b"fine\nna\xefve", {}, "line 2: byte 0xef is not UTF-8; convert"),
    "utf-16": ("a.csv", "text\nfine\n".encode("utf-16"), {}, "is UTF-16; convert it: `iconv"),
    "utf-16 bare": ("a.csv", "text\nfine\n".encode("utf-16-le"), {}, "is UTF-16 or no text"),
    "zip": ("a.zip", zipped("a.csv"), {}, "is a zip archive; unpack it"),
    "excel": ("a.xlsx", zipped("xl/workbook.xml"), {}, "is an Excel workbook; save it as CSV"),
    "excel as csv": ("a.csv", zipped("xl/workbook.xml"), {}, "is an Excel workbook"),
    "old excel": ("a.xls", b"\xd0\xcf\x11\xe0", {}, "is an Excel workbook"),
    "xz": ("a.csv.xz", b"\xfd7zXZ\0", {}, "is xz; unpack it"),
    "half of a gzip": ("a.csv.gz", gzip.compress(b"text\nx\n")[:-9], {}, "is damaged or no gzip"),
    "damaged parquet": ("a.parquet", b"PAR1xx", {}, "is damaged or no Parquet file"),
    "bad json": ("a.jsonl", '{"text": "a"}\n{"text": ', {}, 'line 2: not JSON .*: {"text":'),
    "surrogate": ("a.jsonl", '{"text": "a \\ud800"}', {}, "line 1: not JSON .*surrogate pair"),
    "no array": ("a.json", "[1", {}, "is not JSON .*give an array of objects"),
    "no object": ("a.jsonl", '["a"]', {}, r'line 1: must be a JSON object .*got \["a"\]'),
    "no column": ("a.csv", "a,b\n1,2\n", {}, "no column looks like text; it has a, b; say .*--t"),
    "no header": ("a.csv", "a good film,yes\n" * 5, {}, "line 1 looks like data, .*text,label"),
    "twice": ("a.csv", "text,text\nx,y\n", {}, "two columns are called 'text'; rename"),
    "other column": ("a.csv", "a,b\n1,2\n", {"text_column": "c"}, "no column 'c' .*has a, b"),
    "other label": ("a.csv", "text\nx\n", {"label_column": "c"}, "no column 'c' .--label-column"),
    "same column": (
        "a.csv",
        "text\nx\n",
        dict.fromkeys(("text_column", "label_column"), "text"),
        "both",
    ),
    "not text": ("a.jsonl", '{"text": 3}', {}, "line 1: text must be a string, got 3"),
    "mixed text": ("a.jsonl", '{"text": "a"}\n{"text": ["b"]}', {}, "no column|must be a string"),
    "empty column": ("a.csv", "text,label\n,1\n,0\n", {}, "text .text. is empty in all 2 rows"),
    "no label at all": ("a.csv", "text,label\na,\nb,\n", {}, "label .label. is empty in all 2"),
    "too many fields": ("a.csv", "text,label\na, b,1\n", {}, "line 2: 3 fields, the header has 2"),
    "too few fields": ("a.csv", "text,label\na,1\nb\n", {}, "line 3: 1 fields, the header has 2"),
    "open quote": ("a.csv", 'text\n"a\n', {}, "line 2: unexpected end of data; check"),
    "column of text": ("a.txt", "a", {"text_column": "t"}, "plain text and has no columns"),
    "classes of text": ("a.txt", "a", {"task": "classification"}, "needs labels; use a .csv"),
    "folder": (".", None, {}, "is a folder, and none that datasets' save_to_disk made"),
    "types": (
        *("a.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": "1"}], {}),
        "label mixes types: 1 .line 1. is a number, '1' .line 2. is a string",
    ),
    "list": ("a.jsonl", [{"text": "a", "label": ["x", "y"]}], {}, "a row has one label"),
    "many classes": ("a.jsonl", MANY, {}, "30 different values in 30 rows.*say --label-column"),
    "labels of no name": ("a.jsonl", SOURCES, {}, "source could be the label; say --label-column"),
    "yes or no": ("a.jsonl", YES_NO, {}, "answer could be a label or a completion.*--task"),
    "pairs": ("a.csv", "premise,query,label\nit is so,is it,1\nno it is,was it,0\n", {}, "any of"),
    "two labels": ("a.csv", "text,topic,tag\na,x,y\nb,y,x\n", {}, "any of topic, tag; say --label"),
    "no labels": ("a.csv", "text\nx\n", {"task": "classification"}, "none of text looks like"),
    "label of a model": (
        *("a.csv", "text,label\nx,1\n", {"task": "causal-lm", "label_column": "label"}),
        "is for classification, the task is causal-lm",
    ),
    "preferences": ("a.jsonl", [{"chosen": "a", "rejected": "b"}], {}, "preference trainer"),
    "kto": (
        *("a.jsonl", [{"prompt": "a", "completion": f"{i}", "label": True} for i in range(4)], {}),
        "which could be labels; say --task causal-lm",
    ),
    "no list": ("a.jsonl", [{"messages": [ASKED]}, {"messages": "x"}], {}, "must be a list of"),
    "no role": ("a.jsonl", [{"messages": [{"text": "x"}]}], {}, 'must be {"role": ..., "content"'),
    "picture": ("a.jsonl", [{"messages": [turn("user", [{"type": "image"}])]}], {}, "is no text"),
    "number said": ("a.jsonl", [{"messages": [turn("user", 3)]}], {}, "must be a string, got 3"),
    "no completion": (
        *("a.jsonl", [{"prompt": "a", "completion": ""}], {}),
        "completion .completion. is empty in all 1 rows",
    ),
    "mixed dialogue": (
        *("a.jsonl", [{"prompt": "a", "completion": [ANSWERED]}], {}),
        "texts and lists of messages are mixed",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    name, content, options, message = BAD[case]
    path = tmp_path / name
    if callable(content):
        content(path)
    elif content is not None:
        write(path, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_data(path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["labels of no name", "yes or no", "many classes", "pairs"])
def test_an_option_answers_the_question(tmp_path, case):
    name, content, _, _ = BAD[case]
    path = write(tmp_path / name, content)
    label = {"labels of no name": "source", "yes or no": "answer"}.get(case, "label")
    text = "query" if case == "pairs" else None
    assert read_data(path, label_column=label, text_column=text).form == "labelled"
    assert read_data(path, task="causal-lm", text_column=text).form in ("text", "completion")


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "nobody/nothing:test"])
def test_a_name_of_the_hub(name, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="no data file .*the hub gives no dataset"
    ) as caught:
        read_data(name)
    assert "\n" not in str(caught.value)
    import datasets

    parts = {
        "train": Dataset.from_list([{"text": "a"}]),
        "test": Dataset.from_list([{"text": "b"}]),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda _, split: parts[split] if split else parts)
    if ":" in name:
        assert read_data(name).texts == ["b"]
    else:
        with pytest.raises(AdarankError, match=f"has the splits train, test; name one: {name}:tra"):
            read_data(name)
