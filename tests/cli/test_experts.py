"""A mixture of experts at the command line, with the default targets."""

import json

import pytest

import adarank_fast as ada
from tests.tiny_texts import EXAMPLES, save_tiny


@pytest.fixture
def data(adarank):
    """The folder `model`, and texts with and without labels, in the folder of `adarank`."""
    from pathlib import Path

    save_tiny("mixtral", Path("model"))
    Path("texts.txt").write_text("\n".join(text for text, _ in EXAMPLES))
    rows = "\n".join(f"{text},{label}" for text, label in EXAMPLES)
    Path("rows.csv").write_text(f"text,label\n{rows}\n")


def run(adarank, *arguments):
    status, out, err = adarank(*arguments)
    assert status == 0, err
    assert "Warning" not in err
    return out


def test_predict_gives_experts_ranks(adarank, data):
    options = ("--data", "texts.txt", "--average-rank", 6, "--trials", 2, "--samples", 20)
    out = run(adarank, "predict", "model", *options, "--expert-rank", "divided")
    plan = ada.RankPlan.load("plan.json")
    assert out == plan.table() + "\n"
    assert len(plan.ranks) == 12 and set(plan.experts.values()) == {(4, 2)}
    assert min(plan.ranks[name] for name in plan.experts) >= 1
    assert sum(rank * (1 + (name in plan.experts)) for name, rank in plan.ranks.items()) == 72
    cost = json.loads(run(adarank, "predict", "model", *options, "--dry-run", "--json"))
    assert {module["experts"] for module in cost["modules"]} == {1, 4}
    run(adarank, "plot", "plan.json", "-o", "plan.png")


def test_train_evaluate_and_merge(adarank, data):
    options = ("--data", "rows.csv", "--max-steps", 2, "--batch-size", 4)
    run(adarank, "train", "model", *options, "--rank", 4, "--expert-rank", "divided", "-o", "a")
    plan = ada.RankPlan.load("a/plan.json")
    assert {plan.ranks[name] for name in plan.experts} == {2}
    measured = run(adarank, "evaluate", "model", "a", "--data", "rows.csv", "--json")
    run(adarank, "merge", "model", "a", "-o", "merged")
    merged = run(adarank, "evaluate", "merged", "--data", "rows.csv", "--json")
    losses = [json.loads(text)["loss"] for text in (measured, merged)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--lora-dropout", 0.1), "lora_dropout=0.1: PEFT has it for layers, not for parameters"),
        (("--expert-rank", "half"), "--expert-rank 'half' is unknown; use one of whole, divided"),
        (
            ("--plan", "plan.json", "--expert-rank", "divided"),
            "a plan says the rank of each expert",
        ),
    ],
)
def test_train_refuses(adarank, data, options, message):
    status, _, err = adarank("train", "model", "--data", "rows.csv", *options)
    assert status == 2 and message in err


def test_compare_has_the_same_budget_in_both_arms(adarank, data):
    options = ("--data", "rows.csv", "--average-rank", 4, "--expert-rank", "divided", "--seeds", 1)
    options = (*options, "--max-steps", 1, "--learning-rates", "1e-3", "--trials", 2)
    out = run(adarank, "compare", "model", *options, "-o", "report", "--json")
    arms = json.loads(out)["arms"]
    spent = [arms[arm]["parameters"] for arm in ("adarank", "uniform")]
    assert spent[0] == pytest.approx(spent[1], rel=0.01)
    status, _, err = adarank("compare", "model", *options, "--arms", "eva,uniform", "-o", "eva")
    assert status == 2 and "is a parameter of experts; leave the arm out" in err
