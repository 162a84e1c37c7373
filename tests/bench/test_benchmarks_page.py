"""docs/benchmarks.md: figures, targets and absent files, from small made-up results."""

from __future__ import annotations

import json

from bench.benchmarks_page import PAGE, page

HERE = {
    "date": "2026-01-02",
    "cpu": "Example CPU",
    "cpu_capability": "AVX2",
    "threads": 4,
    "python": "3.11.1",
    "versions": {"torch": "2.13.0", "triton": None},
}
LATER = HERE | {"date": "2026-01-03"}

PREDICTION = {
    "tiny-float32": {
        "seconds": [2.0, 3.0, 4.0],
        "floor_seconds": [2.0, 2.0, 2.0],
        "over_floor": 1.5,
        "gemm_floor": 1.25,
        "naive_over_ours": 3.2,
        "noise_share": 0.0321,
        "peak_over_ordinary_forward": 1.25,
        "machine": HERE,
    },
    "tiny-bfloat16": {
        "seconds": [1.1],
        "floor_seconds": [1.0],
        "over_floor": 1.1,
        "gemm_floor": 0.5,
        "naive_over_ours": 2.0,
        "noise_share": 0.08,
        "peak_over_ordinary_forward": 1.6,
        "machine": LATER,
    },
    "tiny-adaptive": {
        "trials": 200,
        "trials_if_all_had_as_many": 360,
        "saved_ratio": 1.8,
        "fewest": 2,
        "most": 15,
        "machine": HERE,
    },
}


def lora(ratio, interval):
    found = {"ratio": ratio, "interval": interval}
    row = {
        "median_seconds": {"frozen": 0.1},
        "overhead": {"peft": 0.2, "ours": 0.08, "ours, uniform": 0.07},
        "ours_over_peft": found,
        "arithmetic": 0.03,
        "profiled_overhead": {"python": 0.05},
        "peak_bytes": {"ours": 90, "peft": 100},
        "repetitions": 7,
        "machine": HERE,
    }
    summary = {
        "matching dtypes, all rows": found,
        "mixed step over uniform step": {"median": 0.01, "max": 0.04},
        "rows slower than PEFT": ["one"],
        "rows with a higher peak than PEFT": [],
        "machine": HERE,
    }
    return {"block": row, "summary": summary}


def built(folder, **files):
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return page(folder)


def cells(text, row):
    """The cells of the table line that begins with `row`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_prediction(tmp_path):
    text = built(tmp_path, prediction=PREDICTION)
    assert cells(text, "tiny-float32") == [
        "tiny-float32",
        "3.0",
        "2.0",
        "1.2",
        "1.50 (1.00 to 2.00 over 3 rounds): **missed**",
        "3.20: reached",
        "3.2%: reached",
        "1.25: reached",
        "`python -m pytest bench/bench_prediction.py -s -k tiny-float32`",
    ]
    assert cells(text, "tiny-bfloat16")[4:8] == [
        "1.10, one round: reached",
        "2.00",  # the expectation is of float32
        "8.0%: **missed**",
        "1.60: **missed**",
    ]
    assert cells(text, "tiny-adaptive")[1:5] == ["200", "360", "2 to 15", "1.80: reached"]
    machine = "Example CPU (AVX2), 4 threads; Python 3.11.1, torch 2.13.0; 2026-01-0"
    assert f"- tiny-bfloat16: {machine}3." in text
    assert f"- the other 2 rows: {machine}2." in text


def test_absent_files_are_not_run_yet(tmp_path):
    text = built(tmp_path, prediction=PREDICTION)
    assert "Not run yet: `make bench-lora`." in " ".join(text.split())
    assert "`make bench-prediction` writes `bench/results/prediction.json`." in " ".join(
        text.split()
    )
    assert text.count("Not run yet") == text.count("## ") - 1


def test_disagreement(tmp_path):
    row = {
        "adarank_fast_seconds": [2.0, 4.0],
        "materialised_seconds": [2.0, 3.0],
        "materialised_over_adarank_fast": 2.5 / 3,
        "adarank_fast_peak_extra_bytes": 60_000_000,
        "materialised_peak_extra_bytes": 1_500_000_000,
        "peak_share_of_outputs": 0.06,
        "machine": HERE,
    }
    assert cells(built(tmp_path, disagreement={"tv bfloat16": row}), "tv bfloat16")[1:] == [
        "3.0 (2.0 to 4.0)",
        "2.5 (2.0 to 3.0)",
        "0.83: **missed**",
        "60",
        "1,500",
        "6.0%: **missed**",
        "`python -m pytest bench/bench_disagreement.py -s -k bfloat16-tv`",
    ]


def test_lora(tmp_path):
    text = built(tmp_path, lora=lora(0.42, [0.38, 0.46]))
    matching = "overhead over PEFT's, matching dtypes"
    assert cells(text, matching)[1:] == ["0.42 (0.38 to 0.46)", "at most 0.5", "reached"]
    step = "mixed step over the uniform one"
    assert cells(text, f"{step}, median over the rows")[1:] == ["+1.0%", "at most +3%", "reached"]
    assert cells(text, f"{step}, largest of a row")[1::2] == ["+4.0%", "**missed**"]
    assert cells(text, "rows slower than PEFT, whole interval above 1")[1] == "1 of 1"
    assert cells(text, "block")[1:] == [
        *("100.0", "20.0%", "8.0%", "7.0%", "-", "-"),
        *("0.42 (0.38 to 0.46)", "3.0%", "5.0%", "0.900", "7"),
    ]
    text = built(tmp_path, lora=lora(0.52, [0.48, 0.56]))
    assert cells(text, matching)[3] == "**missed**, target within the interval"
    text = built(tmp_path, lora=lora(0.48, [0.44, 0.52]))
    assert cells(text, matching)[3] == "reached, target within the interval"


def test_step(tmp_path):
    row = {
        "median_seconds": {"frozen": 0.25},
        "over_frozen": {"frozen": 1.0, "peft": 1.3, "ours": 1.1, "ours, uniform": 1.05},
        "overhead_over_peft": {"ratio": 1 / 3, "interval": [0.2, 0.5]},
        "mixed_step_over_uniform": 1.1 / 1.05,
        "repetitions": 10,
        "machine": HERE,
    }
    assert cells(built(tmp_path, step={"Tiny, float32": row}), "Tiny, float32")[1:] == [
        *("250", "1.300", "1.100", "1.050", "-", "-"),
        *("0.33 (0.20 to 0.50)", "-", "+4.8%", "10"),
    ]


def test_comparison(tmp_path):
    row = {
        "seconds": 1260.0,
        "run_seconds": 1224.0,
        "training_seconds": 1200.0,
        "prediction_seconds": 12.0,
        "added": 36 / 1224,
        "added_to_steps": 0.05,
        "machine": HERE,
    }
    assert cells(built(tmp_path, compare={"Tiny": row}), "Tiny")[1:] == [
        *("21.0: **missed**", "20.4", "20.0", "12.0", "2.9%: reached", "5.0%"),
    ]


def test_the_committed_page_is_of_the_committed_results():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make benchmarks-page`"
