"""The study and its page: going on after a stop, and figures from small made-up results."""

from __future__ import annotations

import json

import pytest

from adarank_fast.plan.rank_plan import RankPlan
from bench import bench_compare, results_file, study
from bench.results_page import PAGE, Agreement, agreements, page
from bench.study import Enough, Experiment, Limit
from bench.study_plans import MODELS, USUAL, planned
from tests.bench.test_benchmarks_page import HERE, cells
from tests.tiny_texts import EXAMPLES, save_tiny


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "WORK", tmp_path / "work")
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    return tmp_path


def after(runs):
    """Hears of finished runs and stops after so many."""
    left = iter(range(runs - 1, -1, -1))

    def heard(line):
        if next(left) == 0:
            raise Enough

    return heard


def test_stops_and_goes_on(elsewhere):
    options = dict(average_rank=2, epochs=1, batch_size=16, learning_rates=(1e-3, 1e-2))
    folder = save_tiny("bert", elsewhere / "bert")
    data = EXAMPLES[:40], EXAMPLES[40:]
    tiny = Experiment("Tiny, words", lambda: folder, lambda: data, options, seeds=2)
    with pytest.raises(Enough):
        study.train("tiny", tiny, after(5))
    assert not (elsewhere / "study.json").exists()  # 4 of the sweep, 1 of 2 with the first seed
    with pytest.raises(Enough):
        study.train("tiny", tiny, after(2))
    row = json.loads((elsewhere / "study.json").read_text())["tiny"]
    assert row["results"]["settings"]["seeds"] == [0] and row["seeds_planned"] == 2
    heard = []
    study.train("tiny", tiny, heard.append)
    assert len(heard) == 1
    row = json.loads((elsewhere / "study.json").read_text())["tiny"]
    assert row["results"]["settings"]["seeds"] == [0, 1]
    assert row["ranks"]["uniform"] == list(RankPlan.load(plan(elsewhere, "uniform")).ranks.values())
    assert all("curve" not in run for run in row["results"]["runs"])
    assert (elsewhere / "work" / "tiny" / "report.html").exists()
    study.train("tiny", tiny, heard.append)
    assert len(heard) == 1  # nothing is left to do


def plan(folder, arm):
    return folder / "work" / "tiny" / "plans" / f"{arm}.json"


def test_what_comparing_adds(tmp_path):
    options = dict(average_rank=2, epochs=1, batch_size=16, learning_rates=(1e-2,), progress=False)
    folder = save_tiny("bert", tmp_path / "bert")
    found = bench_compare.measure(folder, EXAMPLES[:40], EXAMPLES[40:], seeds=1, **options)
    assert found["seconds"] > found["run_seconds"] > found["training_seconds"] > 0
    assert found["added"] == pytest.approx(found["seconds"] / found["run_seconds"] - 1)
    assert found["added_to_steps"] > found["added"] > 0 < found["prediction_seconds"]


def test_limit_of_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: now[0])
    limit = Limit(seconds=60)
    limit("a run of a second")
    now[0] = 61.0
    with pytest.raises(Enough):
        limit("the next one")


def span(mean, low, high, count):
    return {"mean": mean, "low": low, "high": high, "count": count, "p_value": 0.5}


def arm(values):
    return {
        "by_seed": {str(seed): value for seed, value in enumerate(values)},
        "value": span(sum(values) / len(values), min(values), max(values), len(values)),
        "diverged": {},
        "seeds_disagree": {"argmax": 0.1, "tv": 0.08},
        "rate_at_the_edge": False,
        "prediction_seconds": 1.0,
        "peak_memory_bytes": 2**30,
        "lowest_rank": 1,
        "highest_rank": 4,
        "parameters": 1000,
        "learning_rate": 0.002,
        "step_seconds": 0.1,
        "tokens_per_second": 100.0,
    }


def comparison(mean, low, high):
    seeds = [0, 1, 2]
    return {
        "seeds_planned": 3,
        "machine": HERE,
        "results": {
            "settings": {
                "metric": "accuracy",
                "greater_is_better": True,
                "task": "classification",
                "seeds": seeds,
                "train_items": 4000,
                "held_out_items": 1000,
            },
            "baseline": "uniform",
            "items_are": "accuracy",
            "arms": {"adarank": arm([0.8, 0.82, 0.84]), "uniform": arm([0.8, 0.8, 0.8])},
            "differences": {
                "adarank": {"seeds": span(mean, low, high, 3), "items": span(mean, low, high, 1000)}
            },
            "cell_seconds": 7200.0,
            "cell_cpu_seconds": 3600.0,
        },
    }


def scores(values):
    return {"scores": values, "seconds": 1800.0, "cpu_seconds": 900.0, "machine": HERE}


def built(folder, **files):
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return page(folder)


MR_CLAIM = "MiniLM, MR, average rank 2: "


def test_claims_and_intervals_come_first(tmp_path):
    text = built(tmp_path, study={"minilm-mr-r2": comparison(0.02, 0.01, 0.03)})
    claim = MR_CLAIM + "adarank is better in accuracy than uniform, by more than chance explains"
    assert cells(text, claim)[1:] == [
        *("+2.00 points", "+1.00 to +3.00 points", "+1.00 to +3.00 points"),
        '`make study ARGS="--only minilm-mr-r2"`',
    ]
    assert text.index(claim) < text.index("## ")
    assert cells(text, "adarank")[1].startswith("82.0% (80.0 to 84.0)")
    assert cells(text, "minilm-mr-r2") == ["minilm-mr-r2", "2.00", "1.00"]
    text = built(tmp_path, study={"minilm-mr-r2": comparison(0.002, -0.01, 0.014)})
    none = MR_CLAIM + "No evidence of a difference in accuracy between adarank and uniform"
    assert cells(text, none)[1] == "+0.20 points"


def test_what_is_not_run_or_not_done_is_said(tmp_path):
    text = page(tmp_path)
    assert text.count(": not run yet |") == len(study.TRAINING)
    assert "Nothing is run yet." in text
    row = comparison(0.02, 0.01, 0.03)
    row["seeds_planned"] = 5
    row["results"]["differences"]["adarank"] = None
    text = built(tmp_path, study={"minilm-mr-r2": row})
    claim = MR_CLAIM + "a run of adarank or uniform diverged (3 of 5 seeds so far)"
    assert cells(text, claim)[1:4] == ["-"] * 3


def test_agreement():
    # at average rank 2: 8 ranks as 1, 1, 2, 4 and 1, 2, 1, 4
    found = Agreement.of([1.0, 1.0, 2.0, 4.0], [1.0, 2.0, 1.0, 4.0])
    assert found.changed == {2: 2, 8: 2} and found.modules == 4
    assert found.moved == pytest.approx(4 / 32)  # 4, 4, 8, 16 and 4, 8, 4, 16
    assert Agreement.of([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).spearman == 1.0


def test_plans(tmp_path):
    plans = {
        f"MiniLM: {USUAL}": scores([1.0, 1.0, 2.0, 4.0]),
        "MiniLM: seed 1": scores([1.0, 2.0, 1.0, 4.0]),
        "MiniLM: seed 2": scores([1.0, 1.0, 2.0, 4.0]),
    }
    accumulating = {
        "MiniLM": {"scores": {"exact": {"query": [1.0, 3.0]}, "compounding": {"query": [3.0, 1.0]}}}
    }
    assert set(agreements(plans, accumulating)) == {
        *("MiniLM: seed 1", "MiniLM: seed 2", "MiniLM: compounding")
    }
    text = built(tmp_path, study_plans=plans, accumulating=accumulating)
    assert cells(text, "another seed")[1:3] == ["0 to 2 of 4 (0 to 12%)", "-"]
    assert cells(text, "noise that accumulates")[1] == "2 of 2 (50%)"
    assert cells(text, "seed 1")[1] == "2 and 2 of 4; 12.5%; 0.500"
    assert cells(text, "outputs and stability")[1:] == ["1.50", "0.75"]


def test_every_model_has_a_usual_prediction():
    outputs, stability = planned("outputs"), planned("stability")
    assert {f"{model}: {USUAL}" for model in MODELS} <= outputs.keys()
    assert {model for model, _ in stability.values()} == MODELS.keys()
    assert outputs[f"SmolLM2-135M: {USUAL}"][1].texts == 4 and not planned("accumulating")


def test_the_committed_page_is_of_the_committed_results():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make results-page`"
