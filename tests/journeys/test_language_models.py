"""From chats, or prompts and completions, to answers; in 4 bits; after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.journeys.conftest import questions, write_rows
from tests.tiny_texts import save_tiny

TRAIN = (
    "--epochs 20 --batch-size 10 --learning-rate 2e-2 --max-length 32 --target-modules all-linear"
)


def read_rows(name):
    return [json.loads(line) for line in Path(name).open()]


def test_chat(enter, model):
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in questions()
    ]
    write_rows("chats.jsonl", chats)
    Path("run.yaml").write_text("assistant_only_loss: true\nlr_scheduler_type: cosine\n")
    said = enter(f"adarank train model --data chats.jsonl -o mine --config run.yaml {TRAIN}")
    assert "perplexity" in said and "before" in said
    found = json.loads(enter("adarank evaluate model mine --data chats.jsonl --json"))
    before = json.loads(Path("mine/training.json").read_text())["before"]
    assert found["perplexity"] < 0.5 * before["perplexity"]
    assert found["tokens"] == before["tokens"] == 2 * len(chats)  # answer, end of turn
    enter("adarank apply model mine --data chats.jsonl -o answers.jsonl --max-new-tokens 4")
    answers = read_rows("answers.jsonl")
    assert len(answers) == len(chats)
    assert answers[0]["prompt"] == f"word81 {questions()[0][0]} word80 "  # the template's

    tokenizer = AutoTokenizer.from_pretrained("mine")  # the template came along
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "mine")
    ids = tokenizer.apply_chat_template(
        chats[0]["messages"][:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = peft_model.generate(**{k: ids[k] for k in ("input_ids", "attention_mask")})
    assert output.shape[1] > ids["input_ids"].shape[1]


def test_a_chat_for_a_model_without_template(enter, model):
    (model / "chat_template.jinja").unlink()
    chats = [{"messages": [{"role": "user", "content": "word1"}]}] * 4
    for chat in chats:
        chat["messages"].append({"role": "assistant", "content": "word2"})
    write_rows("chats.jsonl", chats)
    said = enter("adarank train model --data chats.jsonl -o mine", fails=True)
    assert "no chat template" in said and not Path("mine").exists()


def test_prompt_and_completion_packed(enter, model):
    rows = [{"prompt": q, "completion": f" {a}"} for q, a in questions()]
    write_rows("train.jsonl", rows[:50])
    write_rows("test.jsonl", rows[50:])
    record = json.loads(
        enter(
            "adarank train model --data train.jsonl --eval-data test.jsonl -o mine --json "
            f"{TRAIN} --set packing=true --set eval_strategy=epoch --set save_strategy=epoch "
            "--set load_best_model_at_end=true"
        )
    )
    assert record["steps"] < 20 * 5  # several examples a row
    assert record["measured_on"] == "10 examples of test.jsonl"
    found = json.loads(enter("adarank evaluate model mine --data test.jsonl --json"))
    assert found["loss"] == pytest.approx(record["after"]["loss"], rel=1e-4)
    assert found["loss"] < record["before"]["loss"]
    enter("adarank merge model mine -o merged")
    merged = json.loads(enter("adarank evaluate merged --data test.jsonl --json"))
    assert merged["loss"] == pytest.approx(found["loss"], rel=1e-4)


def test_qlora(enter, model):
    rows = [{"prompt": q, "completion": f" {a}"} for q, a in questions()]
    write_rows("rows.jsonl", rows)
    enter(f"adarank train model --data rows.jsonl -o mine --four-bit --average-rank 4 {TRAIN}")
    found = json.loads(enter("adarank evaluate model mine --data rows.jsonl --four-bit --json"))
    record = json.loads(Path("mine/training.json").read_text())
    assert found["loss"] == pytest.approx(record["after"]["loss"], rel=1e-3)
    assert found["loss"] < 0.8 * record["before"]["loss"]
    assert len(set(record["ranks"].values())) > 1


def test_killed_and_typed_again(enter, tmp_path):
    save_tiny("bert", tmp_path / "model")
    rows = [{"text": q, "label": a} for q, a in questions()]
    write_rows("rows.jsonl", rows)
    line = "adarank train model --data rows.jsonl --epochs 12 --batch-size 4 --rank 2 -o"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "adarank_fast", *line.split()[1:], "mine"],
        env=environment,
        stderr=subprocess.PIPE,
    )
    try:
        unfinished, started = Path(".mine.unfinished"), time.monotonic()
        while not list(unfinished.glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None and time.monotonic() - started < 120
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not Path("mine").exists()
    enter(f"{line} mine")
    enter(f"{line} whole")
    both = [Path(name, "adapter_model.safetensors").read_bytes() for name in ("mine", "whole")]
    assert both[0] == both[1] and not unfinished.exists()
