"""`adarank train` and `adarank compare`, from arguments to exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import adarank_fast as ada
from adarank_fast.plan.rank_plan import RankPlan
from tests.tiny_models import tiny
from tests.tiny_texts import EXAMPLES, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("bert", "llama"):
        save_tiny(kind, root / kind)
        RankPlan.uniform(tiny(kind, layers=2), 2).save(root / f"{kind}.json")
    lines = [f"{text},{label}" for text, label in EXAMPLES]
    (root / "texts.csv").write_text("\n".join(["text,label", *lines]))
    (root / "texts.txt").write_text("\n".join(text for text, _ in EXAMPLES))
    RankPlan.uniform(tiny("bert", layers=2), 9).save(root / "large.json")
    return root


@pytest.mark.parametrize("kind, texts", [("bert", "texts.csv"), ("llama", "texts.txt")])
def test_train(adarank, folder, kind, texts):
    arguments = ("train", folder / kind, "--data", folder / texts, "--max-length", 16)
    arguments += ("--plan", folder / f"{kind}.json", "--epochs", 1, "--batch-size", 8)
    status, out, err = adarank(*arguments)
    assert status == 0 and "wrote adapter\nNext: adarank evaluate " in err
    assert "adapter parameters" in out and "before" in out
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {2}
    status, out, err = adarank(*arguments, "--json", "-o", "other")
    assert (status, json.loads(out)["adapter"]) == (0, "other")


def test_compare(adarank, folder):
    arguments = ("compare", folder / "bert", "--data", folder / "texts.csv", "--seeds", 2)
    arguments += ("--arms", "uniform,eva", "--average-rank", 2, "--epochs", 1)
    arguments += ("--learning-rates", "1e-2", "--batch-size", 8)
    status, out, err = adarank(*arguments)
    assert status == 0
    assert "eva minus uniform: " in " ".join(out.split()) and "Held-out accuracy" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "wrote report/report.html\nNext: open it" in err and err.count("run-") == 4
    assert Path("report/report.html").exists()
    status, again, err = adarank(*arguments)
    assert (status, again) == (0, out) and "wrote report/report.html\nNext: open it" in err
    status, out, err = adarank(*arguments, "--json")
    assert (status, "wrote" in err) == (0, False)
    found = json.loads(out)
    assert found["baseline"] == "uniform" and found["understood"]["classes"] == {"a": 30, "b": 30}
    status, out, _ = adarank(*arguments, "--seeds", 1)
    out = " ".join(out.split())
    assert status == 0 and "More seeds are needed to tell eva from uniform" in out
    assert "One seed gives no interval over seeds and no test; run at least 2." in out


BAD = {
    "metric": (["--metric", "nowhere:f"], "--metric 'nowhere:f': No module named"),
    "rates": (["--learning-rates", "fast"], "give numbers separated by commas"),
    "arms": (["--arms", "best"], "arm 'best' is unknown"),
    "plan": (["--plan", "no.json"], "there is no plan file"),
    "task": (["--task", "x"], "--task 'x' is unknown"),
    "dtype": (["--dtype", "int8"], "--dtype 'int8' is unknown"),
    "budget": (["--plan", "{folder}/large.json"], "'large' has 4,608 adapter parameters, +12.5%"),
    "no number": (["--metric", "metrics:nothing"], "nothing returned None, not a finite number"),
    "array": (["--metric", "metrics:array"], "array returned array([[0.,"),
    "failing": (["--metric", "metrics:failing"], "failing failed (KeyError: 'x'); it gets"),
}
METRICS = """
def nothing(predictions, labels): pass
def array(predictions, labels): return predictions
def failing(predictions, labels): raise KeyError("x")
"""


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(adarank, folder, case):
    options, message = BAD[case]
    options = [option.format(folder=folder) for option in options]
    Path("metrics.py").write_text(METRICS)
    status, out, err = adarank("compare", folder / "bert", "--data", folder / "texts.csv", *options)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1] and err.count("error") == 1


def test_train_says_no(adarank, folder, tmp_path):
    status, _, err = adarank(
        *("train", folder / "bert", "--data", folder / "texts.txt", "--task", "classification"),
        *("--plan", folder / "bert.json"),
    )
    assert status == 2 and "classification needs labels" in err
    assert ada.RankPlan.load(folder / "bert.json").parameters > 0
    assert not list(tmp_path.iterdir())
