"""Reading texts, and making batches of them."""

from __future__ import annotations

import json

import pytest
import torch

from adarank_fast.training.data import TextData, hold_out, read_texts
from adarank_fast.training.tokens import add_decoder_inputs, collate, make_batches


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", '{"id": 7, "sentence": "one"}\n\n{"sentence": "two, \\u2028three"}\n'),
        ("a.csv", 'id,Sentence\r\n7,one\r\n8,"two, \u2028three"\r\n'),
        ("a.TSV", "\ufeffsentence\tid\none\t7\ntwo, \u2028three\t8\n"),
        ("a.txt", "one\r\n  \r\ntwo, \u2028three"),
        ("only.csv", 'whatever\none\n"two, \u2028three"\n'),
        ("empty_rows.jsonl", '{"text": " "}\n{"text": "one"}\n{"text": "two, \u2028three"}'),
    ],
)
def test_every_format(tmp_path, name, content):
    data = read_texts(write(tmp_path / name, content))
    assert data.texts == ["one", "two, \u2028three"]
    assert data.labels is None
    assert len(data) == 2


def test_labels(tmp_path):
    lines = [{"text": "a", "label": 1, "topic": "x"}, {"text": "b", "label": 0, "topic": "y"}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert read_texts(path).labels == ["1", "0"]
    assert read_texts(path, label_column="topic").labels == ["x", "y"]
    assert read_texts(path, text_column="topic").texts == ["x", "y"]


def test_text_in_several_lines_and_long(tmp_path):
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", f'text,label\n"two\nlines",p\n{long},q\n')
    assert read_texts(path).texts == ["two\nlines", long]


BAD = {
    "no such file": ("missing.txt", None, {}, "there is no data file .*missing.txt"),
    "suffix": ("a.parquet", b"x", {}, "unknown suffix '.parquet'; use .jsonl"),
    "empty": ("a.txt", "\n \n", {}, "holds no texts"),
    "empty csv": ("a.csv", "", {}, "holds no texts"),
    "header only": ("a.csv", "text,label\n", {}, "holds no texts"),
    "bytes": ("a.txt", b"fine\nna\xefve", {}, "line 2: byte 0xef is not UTF-8; convert"),
    "bad json": ("a.jsonl", '{"text": "a"}\n{"text": ', {}, 'line 2: not JSON .*: {"text":'),
    "no object": ("a.jsonl", '["a"]', {}, r'line 1: must be a JSON object .*got \["a"\]'),
    "no column": ("a.csv", "a,b\n1,2\n", {}, "no column that looks like text; it has a, b;"),
    "other column": ("a.csv", "a,b\n1,2\n", {"text_column": "c"}, "no column 'c' .*has a, b"),
    "other label": ("a.csv", "text\nx\n", {"label_column": "c"}, "no column 'c' .label_column"),
    "not text": ("a.jsonl", '{"text": 3}', {}, "line 1: text must be a string, got 3"),
    "missing text": ("a.jsonl", '{"text": "a"}\n{"x": 1}', {}, "line 2: no value for text"),
    "missing label": ("a.csv", "text,label\na,1\nb\n", {}, "line 3: no value for label"),
    "too many fields": ("a.csv", "text,label\na, b,1\n", {}, "line 2: 3 fields, the header has 2"),
    "open quote": ("a.csv", 'text\n"a\n', {}, "line 1: unexpected end of data; check"),
    "column of text": ("a.txt", "a", {"text_column": "t"}, "plain text and has no columns"),
    "folder": (".", None, {}, "is a folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    name, content, columns, message = BAD[case]
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_texts(path, **columns)
    assert "\n" not in str(caught.value)


class Tokenizer:
    """One token a letter; no pad token."""

    pad_token_id = None
    eos_token_id = 9
    bos_token_id = None
    model_max_length = 5
    model_input_names = ["input_ids", "attention_mask"]

    def __call__(self, texts, truncation, max_length):
        ids = [[ord(c) - 96 for c in text][:max_length] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "extra": ids}


def test_batches_in_order_padded_on_the_right():
    first, second = make_batches(Tokenizer(), ["ab", "abc", "abcdefgh"], batch_size=2)
    assert set(first) == {"input_ids", "attention_mask"}
    assert first["input_ids"].tolist() == [[1, 2, 9], [1, 2, 3]]
    assert first["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert second["input_ids"].tolist() == [[1, 2, 3, 4, 5]]  # the tokenizer's own limit
    assert first["input_ids"].dtype == torch.int64


def test_max_length():
    (batch,) = make_batches(Tokenizer(), ["abc", "d"], max_length=2)
    assert batch["input_ids"].tolist() == [[1, 2], [4, 9]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"texts": []}, "texts is empty"),
        ({"texts": ["a", ""]}, "no tokens"),
        ({"texts": ["a"], "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"texts": ["a"], "max_length": 0}, "max_length must be at least 1, got 0"),
    ],
)
def test_bad_batches(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_batches(Tokenizer(), **arguments)


def test_collate_keeps_numbers():
    items = [{"input_ids": [1, 2], "labels": 3}, {"input_ids": [4], "labels": 5}]
    batch = collate(items, pad=7)
    assert batch["input_ids"].tolist() == [[1, 2], [4, 7]]
    assert batch["labels"].tolist() == [3, 5]


def test_decoder_gets_the_text_shifted():
    (batch,) = add_decoder_inputs(make_batches(Tokenizer(), ["abc", "d"]), start=8)
    assert batch["decoder_input_ids"].tolist() == [[8, 1, 2], [8, 4, 9]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_hold_out_keeps_equal_texts_together():
    data = TextData([f"t{i % 10}" for i in range(40)], [str(i) for i in range(40)])
    rest, held = hold_out(data, 0.2)
    assert len(held) == 8 and len(rest) == 32
    assert not set(rest.texts) & set(held.texts)
    kept = set(held.texts)
    assert held.labels == [str(i) for i in range(40) if f"t{i % 10}" in kept]
