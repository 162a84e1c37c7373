"""Comparisons of tiny models: fair arms, resuming, what is said of them, bad input."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

import adarank_fast as ada
from adarank_fast.adapters.inject import inject
from adarank_fast.comparison import grid
from adarank_fast.comparison.experiment import Experiment, calibration
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.training.trainer import Training
from tests.comparison.comparisons import ARMS, OPTIONS, Killed, encoder, named, run
from tests.tiny_texts import EXAMPLES, save_tiny, tokenizer

TIMES = {"step_seconds", "tokens_per_second", "training_seconds", "seconds", "cell_seconds"}
TIMES |= {"cpu_seconds", "cell_cpu_seconds", "prediction_seconds", "peak_memory_bytes", "date"}


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def test_results(finished):
    _, made = finished
    results = made.results
    assert list(results["arms"]) == list(ARMS)
    budget = RankPlan.uniform(encoder(), 2).parameters
    for arm, numbers in results["arms"].items():
        assert abs(numbers["parameters"] / budget - 1) < 0.01
        mine = [r for r in results["runs"] if r["arm"] == arm]
        assert [r["parameters"] for r in mine] == [numbers["parameters"]] * 2
        values = [r["value"] for r in mine]
        assert numbers["value"]["mean"] == pytest.approx(sum(values) / 2)
        swept = [c for c in results["sweep"] if c["arm"] == arm]
        best = max(swept, key=lambda c: (c["value"], -c["loss"]))
        assert numbers["learning_rate"] == best["learning_rate"]
        assert {r["learning_rate"] for r in mine} == {best["learning_rate"]}
        assert numbers["rate_at_the_edge"]
        assert set(numbers["seeds_disagree"]) == {"argmax", "tv"}
    for arm in ("adarank", "reversed"):
        by_seed = results["differences"][arm]["by_seed"]
        for run_ in (r for r in results["runs"] if r["arm"] == arm):
            other = results["arms"]["uniform"]["by_seed"][str(run_["seed"])]
            assert by_seed[str(run_["seed"])] == pytest.approx(run_["value"] - other)
    assert len(results["sweep"]) == 6 and len(results["runs"]) == 6


def test_same_seeds_same_numbers(finished, tmp_path):
    assert timeless(run(work_dir=tmp_path).results) == timeless(finished[1].results)


def test_killed_and_resumed_gives_the_same_report(finished, tmp_path, monkeypatch):
    calls = []

    def fit(*arguments, original=grid.fit, **options):
        calls.append(1)
        if len(calls) == 8:
            options["on_step"] = stop
        return original(*arguments, **options)

    def stop():
        raise Killed

    monkeypatch.setattr(grid, "fit", fit)
    with pytest.raises(Killed):
        run(work_dir=tmp_path)
    assert len(list((tmp_path / "cells").glob("*.json"))) == 7
    made = run(work_dir=tmp_path)
    assert len(calls) == 8 + 5  # twelve cells, seven were finished
    assert timeless(made.results) == timeless(finished[1].results)
    again = run(work_dir=tmp_path)
    assert len(calls) == 13
    assert again.results == made.results  # times and date too


def test_a_function_hears_of_each_run_and_may_end_the_comparison(tmp_path):
    heard = []

    def progress(line):
        heard.append(line)
        if len(heard) == 2:
            raise Killed

    options = dict(work_dir=tmp_path, progress=progress, learning_rates=(1e-2,))
    with pytest.raises(Killed):
        run(("uniform",), 3, **options)
    assert len(list((tmp_path / "cells").glob("*.json"))) == 2
    run(("uniform",), 3, **options)
    assert len(heard) == 3  # what was finished is not told again
    assert [line.split("-")[2] for line in heard] == ["seed0", "seed1", "seed2"]


def test_arms_and_seeds_can_be_added(tmp_path, monkeypatch):
    run(("uniform",), 1, work_dir=tmp_path, learning_rates=(1e-2,))
    calls = []

    def fit(*arguments, original=grid.fit, **options):
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(grid, "fit", fit)
    run(("adarank", "uniform"), 2, work_dir=tmp_path, learning_rates=(1e-2,))
    assert len(calls) == 3
    with pytest.raises(ValueError, match=r"holds a comparison with batch_size = 8, now 4; name"):
        run(("uniform",), 1, work_dir=tmp_path, learning_rates=(1e-2,), batch_size=4)


def test_identical_plans_give_identical_runs(tmp_path):
    RankPlan.uniform(encoder(), 2).save(tmp_path / "copy.json")
    made = run((str(tmp_path / "copy.json"), "uniform"), 1, learning_rates=(1e-2,))
    copy, uniform = made.results["runs"]
    assert (copy["arm"], uniform["arm"]) == ("copy", "uniform")
    for key in ("first_loss", "curve", "loss", "value"):
        assert copy[key] == uniform[key]
    assert made.results["differences"]["copy"]["by_seed"] == {"0": 0.0}


def test_arms_differ_in_their_ranks_alone(finished):
    configs = []
    for plan in finished[1].plans.values():
        model = inject(encoder(), plan, modules_to_save=["head"])
        config = model.peft_config["default"].to_dict()
        alphas, ranks = config.pop("alpha_pattern"), config.pop("rank_pattern")
        assert alphas == {key: 2 * rank for key, rank in ranks.items()}
        for key in ("r", "lora_alpha", "target_modules"):
            config.pop(key)
        configs.append(config)
    assert configs[0] == configs[1] == configs[2]
    first = [r for r in finished[1].results["runs"] if r["seed"] == 0]
    # B starts at zero, so that every arm starts as the base model with the same head
    assert len({r["first_loss"] for r in first}) == 1
    assert len({r["loss"] for r in first}) == 3


def test_language_model_by_folder(tmp_path):
    folder = save_tiny("llama", tmp_path / "llama", layers=4)
    texts = [text for text, _ in EXAMPLES]
    made = ada.compare(
        folder,
        texts[:40],
        texts[40:],
        ("uniform", "eva"),
        2,
        **OPTIONS | dict(max_length=16, learning_rates=(1e-2,), average_rank=8),
    )
    for run_ in made.results["runs"]:
        assert run_["value"] == pytest.approx(math.exp(run_["loss"]))
        assert 1 < run_["value"] < 200
    assert made.results["settings"]["metric"] == "perplexity"
    assert set(made.results["arms"]["eva"]["seeds_disagree"]) == {"argmax"}
    assert "loss in nats a token" in made.table()


def test_classification_by_folder_and_own_metric(tmp_path):
    folder = save_tiny("bert", tmp_path / "bert")

    def share_of_a(predictions, labels):
        assert predictions.shape == (len(labels), 2)
        return float((predictions.argmax(-1) == 0).mean())

    made = ada.compare(
        str(folder),
        EXAMPLES,
        None,
        ("uniform",),
        1,
        metric=share_of_a,
        **OPTIONS | dict(learning_rates=(1e-2,)),
    )
    settings = made.results["settings"]
    assert (settings["metric"], settings["held_out_items"]) == ("share_of_a", 12)
    assert 0 <= made.results["runs"][0]["value"] <= 1
    assert "One seed gives no interval over seeds" in made.table()


def test_parameters_must_agree(tmp_path):
    RankPlan.uniform(encoder(), 3).save(tmp_path / "big.json")
    with pytest.raises(ValueError, match=r"'big' has [\d,]+ .* \+50.0% of uniform's .*by 1%"):
        run(("uniform", str(tmp_path / "big.json")))


def diverging(monkeypatch, when):
    def fit(model, items, pad, recipe, on_step, original=grid.fit):
        if when(recipe):
            return Training([0.7, math.nan], [0.1, 0.1], 20)
        return original(model, items, pad, recipe, on_step=on_step)

    monkeypatch.setattr(grid, "fit", fit)


def test_a_diverged_run_is_reported_not_averaged(monkeypatch, tmp_path):
    diverging(monkeypatch, lambda recipe: recipe.seed == 1)
    made = run(("adarank", "uniform"), learning_rates=(1e-2,))
    assert made.results["arms"]["adarank"]["value"] is None
    assert made.results["differences"]["adarank"] is None
    assert "1 of 2 diverged" in made.table()
    assert "adarank, seed 1, diverged: training loss nan at step 2." in made.table()
    made.save(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(
        json.dumps(made.results)
    )


def test_diverged_rates_are_not_chosen(monkeypatch):
    diverging(monkeypatch, lambda recipe: recipe.learning_rate == 1e-2)
    made = run(("uniform",), 1)
    assert made.results["arms"]["uniform"]["learning_rate"] == 1e-3
    diverging(monkeypatch, lambda recipe: True)
    with pytest.raises(
        ValueError, match=r"'uniform' diverged at every learning rate .*0.001, 0.01"
    ):
        run(("uniform",), 1)


BAD = {
    "name": (dict(arms=(named("a/b"),)), "arm 'a/b' cannot name a file"),
    "arm": (dict(arms=("best",)), "arm 'best' is unknown; use adarank, uniform, .*eva"),
    "no plan": (dict(arms=("no.json",)), "there is no plan file 'no.json'"),
    "twice": (dict(arms=("uniform", "uniform")), "two arms are called 'uniform'"),
    "string": (dict(arms="uniform"), "arms must be a list"),
    "seeds": (dict(seeds=0), "seeds must be a positive number .* got 0"),
    "same seeds": (dict(seeds=[1, 1]), "seeds must be"),
    "rates": (dict(learning_rates=()), "learning_rates must be different numbers"),
    "rank": (dict(average_rank=0), "average_rank must be a positive integer, got 0"),
    "task": (dict(task="parsing"), "task='parsing' is unknown"),
    "tokenizer": (dict(tokenizer=None), "need tokenizer="),
    "epochs": (dict(epochs=0), "epochs must be a positive integer, got 0"),
    "max_steps": (dict(max_steps=0), "max_steps must be a positive integer, got 0"),
    "trials": (dict(trials=0), "trials must be a positive integer, got 0"),
    "seed": (dict(seeds=[2**32]), r"seeds must be .* below 2\*\*32"),
    "no rate": (dict(learning_rates=(math.nan,)), r"learning_rates must be .* got \[nan\]"),
    "no function": (dict(metric="f1"), "metric must be a function or module:function, got 'f1'"),
    "scaling": (dict(scaling="big"), "scaling"),
    "dtype": (dict(dtype="int8"), "dtype='int8' is unknown"),
    "misspelt": (dict(epoch=1), "no argument 'epoch'; did you mean 'epochs'"),
    "misspelt argument": (dict(work_dri=1), "no argument 'work_dri'; did you mean 'work_dir'"),
    "both": (dict(design=ada.Design(), epochs=1), "given beside a Design"),
    "metric": (dict(metric=lambda p, y: None), "returned None, not a finite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path):
    changes, message = BAD[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        run(work_dir=tmp_path / "report", **changes)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("cells"))


def test_bad_data():
    with pytest.raises(TypeError, match="data must be a file, texts"):
        ada.compare(encoder, [], EXAMPLES)
    with pytest.raises(ValueError, match="need two classes|needs two classes"):
        ada.compare(encoder, [("x y", "a")] * 9, [("z", "a")], tokenizer=tokenizer())
    with pytest.raises(TypeError, match="must return a torch module, got NoneType"):
        run(("uniform",), 1, model=lambda: None)


def test_tokenised_items():
    items = [
        {"input_ids": [3 + i % 7, 4, 5], "attention_mask": [1, 1, 1], "labels": i % 2}
        for i in range(30)
    ]
    made = ada.compare(
        encoder,
        items[:24],
        items[24:],
        ("uniform",),
        1,
        modules_to_save=["head"],
        **OPTIONS | dict(learning_rates=(1e-2,)),
    )
    assert made.results["settings"]["classes"] == 2


@pytest.mark.parametrize("length, count", [(5, 32), (128, 16), (1000, 3)])
def test_calibration_is_of_so_many_tokens(length, count):
    items = [{"input_ids": [7] * length, "attention_mask": [1] * length, "labels": 0}] * 40
    found = calibration(Experiment("", "classification", encoder, {}, 0, 2, items, items))
    assert sum(len(part["input_ids"]) for part in found) == count
    assert max(len(part["input_ids"]) for part in found) <= 16
    assert found[0].keys() == {"input_ids", "attention_mask"}


def test_options_are_judged_before_torch_is_imported(tmp_path):
    code = """
import sys
import adarank_fast as ada
for options in (dict(arms=["no"]), dict(epochs=0), dict(work_dir=sys.argv[1]), dict(scaling="x")):
    try:
        ada.compare("model", "data", **options)
    except ada.AdarankError:
        assert "torch" not in sys.modules, options
    else:
        raise SystemExit(1)
"""
    (tmp_path / "notes").write_text("mine")
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
