"""People with code of their own: a PEFT script, an allocator and a metric, files with mistakes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

import adarank_fast as ada
from tests.journeys.conftest import questions, write_rows
from tests.tiny_texts import EXAMPLES, save_tiny

PEFT_SCRIPT = """
import json, sys
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained("model")
model = AutoModelForCausalLM.from_pretrained("model")
config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
# PLAN
model = get_peft_model(model, config)
# ACCELERATE
texts = [json.loads(line)["text"] for line in open("rows.jsonl")]
rows = Dataset.from_list([
    {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}
    for ids in (tokenizer(text)["input_ids"][:6] for text in texts) if len(ids) == 6
])
arguments = TrainingArguments(
    "scratch", max_steps=25, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1,
    save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
model.save_pretrained("adapter")
"""
ACCELERATE = "import adarank_fast; adarank_fast.accelerate(model)"
PLAN = 'config = LoraConfig(**json.load(open("lora.json")), task_type="CAUSAL_LM")'


def run_script(**lines):
    """The losses of the script, with these lines of ours put in."""
    script = PEFT_SCRIPT
    for mark, line in lines.items():
        script = script.replace(f"# {mark}", line)
    Path("script.py").write_text(script)
    return runpy.run_path("script.py")


def test_an_existing_peft_script(enter, model):
    write_rows("rows.jsonl", [{"text": f"{text} word1 word2 word3"} for text, _ in EXAMPLES])
    plain = run_script()
    fused = run_script(ACCELERATE=ACCELERATE)
    assert fused["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert ada.fusion_report(fused["model"]).fused_share == 1.0

    enter("adarank predict model --data rows.jsonl --trials 2 --average-rank 4 -o plan.json")
    said = enter("adarank export plan.json")
    Path("lora.json").write_text(said)
    mixed = run_script(PLAN=PLAN, ACCELERATE=ACCELERATE)
    plan = ada.RankPlan.load("plan.json")
    parameters = sum(p.numel() for n, p in mixed["model"].named_parameters() if "lora_" in n)
    assert parameters == plan.parameters and len(set(plan.ranks.values())) > 1
    assert mixed["losses"][-1] < mixed["losses"][0]
    enter("adarank merge model adapter -o merged")
    found = json.loads(enter("adarank evaluate merged --data rows.jsonl --json"))
    assert found["loss"] < mixed["losses"][0]


MINE = """
import numpy


def deeper_is_more(problem):
    return problem.within_budget({name: 1.0 + i for i, name in enumerate(problem.uniform.ranks)})


def recall_of_b(logits, labels):
    return float(numpy.mean(logits.argmax(-1)[labels == 1] == 1))
"""


def test_an_allocator_and_a_metric_of_ones_own(enter, tmp_path):
    save_tiny("bert", tmp_path / "model")
    Path("mine.py").write_text(MINE)
    write_rows("rows.jsonl", [{"text": text, "label": label} for text, label in EXAMPLES])
    said = enter(
        "adarank compare model --data rows.jsonl --arms mine:deeper_is_more,uniform --seeds 2 "
        "--metric mine:recall_of_b --average-rank 2 --epochs 4 --learning-rates 2e-2 "
        "--batch-size 8"
    )
    assert "Held-out recall_of_b" in said and "deeper_is_more minus uniform: " in said
    plan = ada.RankPlan.load("report/plans/deeper_is_more.json")
    first, *_, last = plan.ranks.values()
    assert first < last
    enter(
        "adarank train model --data rows.jsonl --plan report/plans/deeper_is_more.json -o mine "
        "--epochs 12 --batch-size 8 --learning-rate 2e-2"
    )
    ranks = json.loads(Path("mine/training.json").read_text())["ranks"]
    assert ranks == plan.ranks
    assert json.loads(enter("adarank evaluate model mine --data rows.jsonl --json"))["f1"] > 0.6


def test_mistakes_in_a_file_and_their_remedies(enter, model):
    """Each refusal says what to type; typed, it leads on, to answers at the end."""
    rows = [{"question": q, "answer": f" {a}", "source": "web"} for q, a in questions()]
    Path("rows.jsonl").write_text(
        "\n".join(map(json.dumps, rows[:5])) + '\n{"question": "word1", "answer": \n'
    )
    line = "adarank train model --data rows.jsonl -o mine --rank 2 --epochs 6 --batch-size 10"
    assert "rows.jsonl" in (said := enter(line, fails=True)) and "line 6" in said
    write_rows("rows.jsonl", [*rows, {"question": "word1 word2", "answer": ""}])
    assert "--learning-rate" in enter(f"{line} --learning-rat 2e-2", fails=True)
    line += " --learning-rate 2e-2 --max-length 32"
    assert "--task causal-lm for completions" in enter(line, fails=True)  # few different answers
    line += " --task causal-lm"
    assert "did you mean 'warmup_steps'" in enter(f"{line} --set warmup_step=2", fails=True)
    assert not Path("mine").exists()
    enter(f"{line} --set warmup_steps=2")
    record = json.loads(Path("mine/training.json").read_text())
    assert (record["form"], record["examples"]) == ("completion", len(rows))
    assert record["after"]["loss"] < record["before"]["loss"]
    said = enter("adarank apply model mine --data row.jsonl -o answers.jsonl", fails=True)
    assert "there is no data file 'row.jsonl'" in said
    enter("adarank apply model mine --data rows.jsonl -o answers.jsonl --max-new-tokens 2")
    assert len(Path("answers.jsonl").read_text().splitlines()) == len(rows) + 1
