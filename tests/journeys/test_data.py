"""From a CSV of reviews to predictions; what mistakes in data say; a comparison on chats."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import adarank_fast as ada
from adarank_fast.training.data import read_data
from adarank_fast.training.language_model import LanguageModel, full_text
from adarank_fast.training.loading import load_pretrained
from tests.journeys.conftest import questions, write_rows
from tests.tiny_texts import EXAMPLES, save_tiny

MOODS = {"a": "negative", "b": "positive"}
TRAIN = "--rank 2 --epochs 12 --batch-size 8 --learning-rate 2e-2 --max-length 16"


def write_reviews(name, rows):
    with open(name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("review", "sentiment", "id"), *rows])


def reviews():
    return [(text, MOODS[label], i) for i, (text, label) in enumerate(EXAMPLES)]


def test_a_csv_of_reviews(adarank, enter, tmp_path):
    save_tiny("bert", tmp_path / "model")
    write_reviews("train.csv", [*reviews(), ("word1 word2", "", 60), ("", "positive", 61)])
    write_reviews("test.csv", reviews()[:20])
    status, out, err = adarank(*f"train model --data train.csv -o mine {TRAIN} --json".split())
    assert status == 0
    for line in (
        "train.csv: 62 rows; text is column review, label is column sentiment",
        "task classification, 2 classes: negative (30), positive (30)",
        "dropped 2 rows: 1 without a label, 1 without text",
        "unused columns: id",
    ):
        assert line in err.splitlines()
    found = json.loads(out)
    assert found["understood"]["dropped"] == {"without a label": 1, "without text": 1}
    assert found["classes"] == ["negative", "positive"] and found["after"]["accuracy"] > 0.7
    found = json.loads(enter("adarank evaluate model mine --data test.csv --json"))
    assert found["accuracy"] > 0.7 and found["understood"]["columns"]["label"] == "sentiment"
    enter("adarank apply model mine --data test.csv -o predictions.jsonl")
    answers = [json.loads(line) for line in Path("predictions.jsonl").open()]
    assert [one["text"] for one in answers] == [text for text, _, _ in reviews()[:20]]
    assert {one["class"] for one in answers} == {"negative", "positive"}

    write_reviews("new.csv", [("word1 word2", "mixed", 0), ("word3 word4", "positive", 1)])
    assert "no class 'mixed'" in enter("adarank evaluate model mine --data new.csv", fails=True)
    said = enter(f"adarank train model --data train.csv --eval-data new.csv {TRAIN}", fails=True)
    assert "have a label 'mixed' that the training data do not have" in said


MISTAKES = {
    "texts for an encoder": ("model", [{"text": "word1 word2 word3"}], "no language-model head"),
    "which text": (
        *("model", [{"title": "word1 word2", "body": "word3 word4", "label": 1}]),
        "could be any of body, title; say which with --text-column",
    ),
    "which label": (
        *("model", [{"text": f"word{i}", "source": "web"} for i in range(8)]),
        "source could be the label; say --label-column source, or --task causal-lm",
    ),
    "one class": ("model", [{"text": "word1", "label": "x"}] * 4, "needs two classes"),
    "chats for a classifier": (
        *("model", [{"messages": [{"role": "user", "content": "word1"}]}]),
        "none of 1 rows can be used: 1 without an assistant's turn",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(enter, tmp_path, case):
    model, rows, message = MISTAKES[case]
    save_tiny("bert", tmp_path / "model")
    write_rows("rows.jsonl", rows)
    said = enter(f"adarank train {model} --data rows.jsonl -o mine --rank 2", fails=True)
    assert message in said.splitlines()[-1]
    assert not Path("mine").exists()


def test_chats_are_predicted_and_compared_as_they_are_trained(enter, model):
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in questions()
    ]
    write_rows("chats.jsonl", chats)
    plan = json.loads(enter("adarank predict model --data chats.jsonl --trials 2 --json"))
    assert plan["understood"]["form"] == "chat"
    network, tokenizer = load_pretrained("model", "cpu")
    trained = LanguageModel(read_data("chats.jsonl"), None, tokenizer, {"max_length": 128})
    batches = trained.calibration(64, torch.device("cpu"), batch_size=16)
    text = full_text(trained.rows[0], tokenizer)
    assert text.startswith("word81 ") and text.endswith("</s>")  # the template's
    again = ada.predict_ranks(network, batches, trials=2, progress=False)
    assert plan["settings"]["batches"] == again.settings["batches"]  # a digest of them
    found = json.loads(
        enter(
            "adarank compare model --data chats.jsonl --arms uniform,random --average-rank 2 "
            "--seeds 1 --epochs 1 --learning-rates 1e-2 --max-length 32 --json"
        )
    )
    assert found["understood"]["form"] == "chat" and found["baseline"] == "uniform"
