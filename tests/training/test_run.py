"""`adarank train` from arguments to folder: runs that were cut off, results that load."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import adarank_fast as ada
import adarank_fast.prediction.predict as predict
from adarank_fast.training import run as running
from adarank_fast.training import trainer as training
from adarank_fast.training.data import as_data
from tests.tiny_texts import EXAMPLES, WORDS, save_tiny, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models, and data of each form."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("bert", "llama"):
        save_tiny(kind, root / kind)
    for count in (2, 3, 50):
        names = [f"{'class'} {i % count}" for i in range(max(60, 4 * count))]
        rows = [f"{EXAMPLES[i % 60][0]},{name}" for i, name in enumerate(names)]
        (root / f"{count}.csv").write_text("\n".join(["text,label", *rows]))
    rows = [{"prompt": text, "completion": f" {WORDS[i]}"} for i, (text, _) in enumerate(EXAMPLES)]
    (root / "completion.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


TASKS = {
    "classification": ("bert", "2.csv"),
    "language model": ("llama", "completion.jsonl"),
}
OPTIONS = (
    *("--rank", 2, "--epochs", 3, "--batch-size", 8, "--learning-rate", "1e-2"),
    *("--lora-dropout", 0.1, "--set", "gradient_accumulation_steps=2", "--set", "save_steps=2"),
)


def command(folder, task, *more):
    model, data = TASKS[task]
    return ("train", folder / model, "--data", folder / data, *OPTIONS, *more)


def cut_after(monkeypatch, step):
    """The process is interrupted at the end of a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(running.Progress, "on_step_end", on_step_end)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(adarank, folder, monkeypatch, task):
    more = ("--eval-data", folder / TASKS[task][1], "--early-stopping", 9)
    assert adarank(*command(folder, task, *more, "-o", "whole"))[0] == 0
    with monkeypatch.context() as patch:
        cut_after(patch, 7)
        assert adarank(*command(folder, task, *more, "-o", "cut"))[0] == 130
    assert not Path("cut").exists() and list(Path(".cut.unfinished").glob("checkpoint-6"))
    status, _, err = adarank(*command(folder, task, *more, "-o", "cut", "--max-steps", 9))
    assert status == 2 and "holds an unfinished run with settings = " in err
    steps = []
    monkeypatch.setattr(training.Watch, "on_step_begin", lambda *a, **k: steps.append(1))
    monkeypatch.setattr(training.Watch, "_started", 0.0, raising=False)
    assert adarank(*command(folder, task, *more, "-o", "cut"))[0] == 0
    whole, cut = Path("whole"), Path("cut")
    for name in ("adapter_model.safetensors", "plan.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    records = [json.loads((one / "training.json").read_text()) for one in (whole, cut)]
    assert records[0] == records[1] and len(steps) < records[0]["steps"] == 12
    assert {path.name for path in Path().iterdir()} == {"whole", "cut"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("early", [False, True], ids=["last step", "early stop"])
def test_a_run_that_was_cut_off_at_its_end_is_not_trained_on(
    adarank, folder, monkeypatch, task, early
):
    """Its last checkpoint is of the last step: within an epoch, or where it was stopped early."""
    more = ["--max-steps", 10]
    if early:  # without progress
        more = ["--eval-data", folder / TASKS[task][1], "--early-stopping", 1]
        more += ["--learning-rate", "1e-12"]
    assert adarank(*command(folder, task, *more, "-o", "whole"))[0] == 0

    def cut(*_, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "new_folder", cut)
        assert adarank(*command(folder, task, *more, "-o", "cut"))[0] == 130
    monkeypatch.setattr(training.Watch, "on_step_begin", cut)
    assert adarank(*command(folder, task, *more, "-o", "cut"))[0] == 0
    whole, again = (
        {p.name: p.read_bytes() for p in Path(name).iterdir()} for name in ("whole", "cut")
    )
    assert whole["adapter_model.safetensors"] == again["adapter_model.safetensors"]
    record = json.loads(whole["training.json"])
    assert record == json.loads(again["training.json"]) and record["steps"] < 12


def test_a_run_that_diverged_before_it_was_cut_off_is_not_saved(adarank, folder, monkeypatch):
    batch = training.Watch.batch
    with monkeypatch.context() as patch:
        cut_after(patch, 7)
        patch.setattr(training.Watch, "batch", lambda s, loss, x: batch(s, 0.1 * loss, x))
        assert adarank(*command(folder, "classification"))[0] == 130
    status, _, err = adarank(*command(folder, "classification"))
    assert status == 2 and "training loss rose from 0.0" in err  # 0.69 / 10
    assert not list(Path().iterdir())


def test_a_run_that_goes_on_with_other_products_says_so(adarank, folder, monkeypatch):
    with monkeypatch.context() as patch:
        cut_after(patch, 7)
        patch.setattr(training, "products", lambda model: "Triton")
        assert adarank(*command(folder, "classification"))[0] == 130
    with pytest.warns(UserWarning, match="this run began with products = Triton and goes on with"):
        assert adarank(*command(folder, "classification"))[0] == 0


def test_killed_while_the_checkpoints_are_removed(adarank, folder, monkeypatch):
    def kill(path, *more, original=running.shutil.rmtree, **options):
        if Path(path).suffix == ".tmp":
            raise KeyboardInterrupt
        original(path, *more, **options)

    arguments = ("train", folder / "bert", "--data", folder / "2.csv", "--rank", 2, "--max-steps")
    with monkeypatch.context() as patch:
        patch.setattr(running.shutil, "rmtree", kill)
        assert adarank(*arguments, 3)[0] == 130
    before = Path("adapter/adapter_model.safetensors").read_bytes()
    assert len(list(Path().iterdir())) == 2
    assert adarank(*arguments, 4)[0] == 0  # other settings: nothing is unfinished
    assert Path("adapter/adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in Path().iterdir()] == ["adapter"]


def test_a_broken_checkpoint_is_passed_over(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({}))
    (tmp_path / "checkpoint-4").mkdir()
    assert running.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()


def snippets(folder):
    return re.findall(r"```python\n(.*?)```", (Path(folder) / "README.md").read_text(), re.S)


def run_snippet(code):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "README.md", "exec"), {})
    return said.getvalue()


@pytest.mark.parametrize(
    "model, data, classes",
    [("bert", "2.csv", 2), ("bert", "3.csv", 3), ("bert", "50.csv", 50), ("llama", "3.csv", 3)],
)
def test_the_card_loads_a_classifier(adarank, folder, model, data, classes):
    arguments = ("train", folder / model, "--data", folder / data, "--rank", 2, "--max-steps", 3)
    assert adarank(*arguments, "-o", "mine")[0] == 0
    status, out, _ = adarank(
        *("evaluate", folder / model, "mine", "--data", folder / data, "--json")
    )
    record = json.loads(Path("mine/training.json").read_text())
    measured = json.loads(out)
    for name in ("accuracy", "f1", "loss"):
        assert measured[name] == pytest.approx(record["after"][name], abs=1e-5)
    assert adarank("apply", folder / model, "mine", "--data", folder / data)[0] == 0
    predictions = [json.loads(line) for line in Path("predictions.jsonl").open()]
    assert len(predictions) == measured["examples"]
    hits = [p["class"] == f"class {i % classes}" for i, p in enumerate(predictions)]
    assert sum(hits) / len(hits) == pytest.approx(measured["accuracy"])
    assert record["classes"] == sorted(f"class {i}" for i in range(classes))
    assert all(record["classes"][p["number"]] == p["class"] for p in predictions)
    assert adarank("merge", folder / model, "mine", "-o", "mine-merged")[0] == 0
    adapted, merged = (run_snippet(code) for code in snippets("mine"))
    numbers = [
        [float(line.rpartition(" ")[2]) for line in out.splitlines()] for out in (adapted, merged)
    ]
    assert len(numbers[0]) == 2 and numbers[0] == pytest.approx(numbers[1], abs=1e-5)
    assert " class " in adapted and 1 / classes <= numbers[0][0] <= 1
    status, out, _ = adarank("evaluate", "mine-merged", "--data", folder / data, "--json")
    assert json.loads(out)["loss"] == pytest.approx(measured["loss"], abs=1e-5)


def test_the_card_loads_a_language_model(adarank, folder):
    model, data = folder / "llama", folder / "completion.jsonl"
    arguments = ("train", model, "--data", data, "--rank", 2, "--max-steps", 3)
    assert adarank(*arguments, "-o", "mine")[0] == 0
    status, out, _ = adarank("evaluate", model, "mine", "--data", data, "--json")
    record = json.loads(Path("mine/training.json").read_text())
    assert json.loads(out)["perplexity"] == pytest.approx(record["after"]["perplexity"], rel=1e-4)
    assert json.loads(out)["tokens"] == 2 * len(EXAMPLES)  # the completion and the end of text
    assert adarank("merge", model, "mine", "-o", "mine-merged")[0] == 0
    adapted, merged = (run_snippet(code) for code in snippets("mine"))
    assert adapted == merged
    assert adarank("apply", model, "mine", "--data", data, "--max-new-tokens", 4)[0] == 0
    first = json.loads(Path("predictions.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == EXAMPLES[0][0] and len(first["generated"].split()) <= 4


def test_a_head_for_other_classes_gives_way(adarank, folder, tmp_path_factory):
    """A checkpoint that was trained for two classes, and data of three."""
    base = tmp_path_factory.mktemp("head") / "base"
    AutoModelForSequenceClassification.from_pretrained(folder / "bert").save_pretrained(base)
    tokenizer().save_pretrained(base)
    assert adarank("train", base, "--data", folder / "3.csv", "--rank", 2, "--max-steps", 2)[0] == 0
    adapted, _ = snippets("adapter")
    assert "ignore_mismatched_sizes" in adapted
    assert run_snippet(adapted).count("class ") == 2
    data = Path("unseen.csv")
    data.write_text("text,label\nword1 word2,class 0\nword3,other\n")
    status, _, err = adarank("evaluate", base, "adapter", "--data", data)
    assert status == 2 and "the model has no class 'other' (1 such labels); its classes are" in err


def test_ranks_are_predicted_where_none_are_given(adarank, folder, monkeypatch):
    arguments = ("train", folder / "bert", "--data", folder / "2.csv", "--average-rank", 3)
    with monkeypatch.context() as patch:
        cut_after(patch, 2)
        assert adarank(*arguments, "--max-steps", 3)[0] == 130
    with monkeypatch.context() as patch:  # a run that goes on does not predict again
        patch.setattr(predict, "predict_ranks", None)
        assert adarank(*arguments, "--max-steps", 3)[0] == 0
    plan = ada.RankPlan.load("adapter/plan.json")
    assert sum(plan.ranks.values()) == 3 * len(plan.ranks) and len(set(plan.ranks.values())) > 1
    assert plan.settings["batches"]["items"] == 60
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert {*config["rank_pattern"].values(), config["r"]} == {*plan.ranks.values()} - {0}


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_changes_nothing_of_a_model_in_memory(folder, task):
    name, data = TASKS[task]
    kind = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    model, tokens = kind.from_pretrained(folder / name).train(), tokenizer(padding=False)
    model.config.id2label = {0: "class 0", 1: "class 1"}
    before = [*vars(model)], model.config.to_dict(), tokens.pad_token, [model.training]
    drawn = torch.get_rng_state(), random.getstate()
    found = ada.evaluate(model, folder / data, tokenizer=tokens)
    assert before == ([*vars(model)], model.config.to_dict(), tokens.pad_token, [model.training])
    assert torch.equal(drawn[0], torch.get_rng_state()) and drawn[1] == random.getstate()
    assert found.get("examples", 60) == 60 and 0.5 < found["loss"] < 5
    with pytest.raises(ada.AdarankError, match="a model in memory needs its tokenizer="):
        ada.evaluate(model, folder / data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "here"}, "adapter= is for a model that is a name"),
        ({"max_length": 0}, "max_length must be a positive integer, got 0"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({}, "the data have no labels to compare with"),
    ],
)
def test_evaluate_refuses(folder, options, message):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "bert")
    texts = as_data(["word1 word2", "word3"])
    with pytest.raises(ada.AdarankError, match=message):
        ada.evaluate(model, texts, tokenizer=tokenizer(padding=False), **options)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("bert", "(BertModel) has no language-model head, which causal-lm"),
        ("classifier", "(BertForSequenceClassification) has no language-model head"),
        ("t5", "not a decoder-only"),
    ],
)
def test_models_that_are_no_language_model(adarank, folder, tmp_path_factory, kind, message):
    model = save_tiny("t5" if kind == "t5" else "bert", tmp_path_factory.mktemp("other") / kind)
    if kind == "classifier":
        config = json.loads((model / "config.json").read_text())
        config["architectures"] = ["BertForSequenceClassification"]
        (model / "config.json").write_text(json.dumps(config))
    said = set()
    for command in (["train", model, "--rank", 2], ["compare", model, "--average-rank", 2]):
        status, _, err = adarank(*command, "--data", folder / "completion.jsonl")
        assert status == 2 and message in err and not list(Path().iterdir())
        said.add(err.splitlines()[-1])
    with pytest.raises(ada.AdarankError) as refused:
        ada.compare(model, folder / "completion.jsonl", task="causal-lm")
    assert said == {f"adarank: error: {refused.value}"}


def test_a_label_that_is_not_called_one_is_a_question(adarank, folder):
    Path("reviews.csv").write_text("review,verdict\n" + "word1 word2,good\nword3,bad\n" * 4)
    arguments = ("train", folder / "llama", "--data", "reviews.csv", "--rank", 2, "--max-steps", 1)
    status, _, err = adarank(*arguments)
    assert status == 2 and "verdict" in err and "--label-column" in err
    assert adarank(*arguments, "--label-column", "verdict")[0] == 0
    assert json.loads(Path("adapter/training.json").read_text())["classes"] == ["bad", "good"]
    assert adarank(*arguments, "--task", "causal-lm")[0] == 0
    assert json.loads(Path("adapter/training.json").read_text())["form"] == "text"


def test_evaluate_says_no(adarank, folder):
    for adapter, message in (
        (folder, "no adapter_config.json"),
        (None, "neither a classifier nor"),
    ):
        model = [folder / "bert", *([adapter] if adapter else [])]
        for verb in ("evaluate", "apply"):
            status, _, err = adarank(verb, *model, "--data", folder / "2.csv")
            assert status == 2 and message in err and err.count("\n") == 1


BAD = {
    "two sources": (["--rank", 2, "--average-rank", 4], "--average-rank and --rank each set the"),
    "no plan": (["--plan", "no.json"], "there is no plan file"),
    "set": (["--set", "learning_rat=1"], "did you mean 'learning_rate'?"),
    "type": (["--set", "num_train_epochs=many"], "num_train_epochs takes a number, got 'many'"),
    "ours": (["--set", "output_dir=x"], "output_dir cannot be set: the adapter goes to"),
    "twice": (
        ["--epochs", 1, "--set", "num_train_epochs=2"],
        "num_train_epochs= and --epochs name",
    ),
    "no value": (["--set", "seed"], "give name=value"),
    "choice": (["--set", "lr_scheduler_type=up"], "up is not a valid SchedulerType"),
    "config": (["--config", "no.yaml"], "--config: there is no file 'no.yaml'"),
    "watch": (["--early-stopping", 3], "--early-stopping needs --eval-data"),
    "library": (["--rank", 2, "--set", "report_to=wandb"], "Trainer refuses"),
    "scaling": (["--scaling", "x"], "scaling"),
}


@pytest.mark.parametrize("case", BAD)
def test_train_says_no(adarank, folder, tmp_path, case):
    options, message = BAD[case]
    status, out, err = adarank(*("train", folder / "bert", "--data", folder / "2.csv"), *options)
    assert (status, out) == (2, "") and message in err.splitlines()[-1]
    assert not list(Path().iterdir())
