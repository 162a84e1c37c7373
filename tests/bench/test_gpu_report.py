"""The GPU benchmark's file and page."""

from __future__ import annotations

import json
from pathlib import Path

from bench.gpu import page, report, rows
from bench.gpu.context import Row
from bench.results_file import write_json

CHECKS = [
    {"op": "lora_shrink", "case": "its own check", "kernels": "lora_shrink", "dtype": "16-bit"}
    | {"status": "passed", "share": None},
    {"op": "lora_linear", "case": "rank 6", "kernels": "+ drop", "dtype": "bfloat16"}
    | {"status": "failed: ArithmeticError: dx: error 0.5 above 0.01", "share": None},
]
ROWS: list[Row] = [
    {"row": "block", "variant": "frozen", "status": "ok", "eager_seconds": 0.002},
    {"row": "block", "variant": "ours", "status": "ok", "graph": "RuntimeError: broke off"},
    {"row": "large", "variant": "all", "status": "out of memory"},
]


def test_file_of_made_up_measurements(tmp_path: Path) -> None:
    facts = {"card": "Some Card 9000", "driver": "1.2", "time": "2026-01-02T03:04:05+00:00"}
    found = report.content(facts, {"quick": True}, CHECKS, {"blocks": ROWS}, True)
    path = tmp_path / "folder" / report.default_path(facts["card"], facts["time"][:10]).name
    write_json(path, found)
    assert [p.name for p in path.parent.iterdir()] == ["some-card-9000-2026-01-02.json"]
    assert json.loads(path.read_text()) == found
    assert found["machine"]["versions"]["torch"] and found["machine"]["card"] == facts["card"]
    assert found["failures"] == [f"lora_linear, rank 6, + drop, bfloat16: {CHECKS[1]['status']}"]
    assert report.notes(found["sections"]) == [
        "block, ours: no graph: RuntimeError: broke off",
        "large, all: out of memory",
    ]


def test_the_cards_rates_in_words() -> None:
    rows: list[Row] = [
        {"variant": "copy", "bytes": 4e9, "flops": 0.0, "eager_seconds": 2.0, "graph_seconds": 1.0},
        {"variant": "product", "bytes": 1.0, "flops": 3e12, "eager_seconds": 2.0},
        {"variant": "failed", "status": "out of memory"},
    ]
    assert page.card_rates(rows) == "copy: 4 GB/s; product: 1.5 TFLOP/s"


def test_the_committed_page_is_of_the_committed_files() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page()


def test_page_of_a_small_run(tmp_path: Path) -> None:
    assert "No card yet" in page.page(tmp_path)
    step = {"row": "tiny", "status": "ok"}
    found = {
        "machine": report.machine() | {"card": "Example card", "gpu": "Example card"},
        "options": {"tokens": [4, 1024], "dtype": "bfloat16", "repetitions": 7},
        "failures": ["lora_down: wrong"],
        "checks": [{"status": "passed"}, {"status": "failed"}],
        "sections": {
            "card": [step | {"variant": "copy", "eager_seconds": 1.0, "bytes": 3e9}],
            "blocks": [
                step | {"variant": "frozen", "graph_seconds": 1e-3, "eager_seconds": 2e-3},
                step | {"variant": "peft", "graph_seconds": 3e-3, "eager_seconds": 4e-3},
                step | {"variant": "ours, default", "graph_seconds": 2e-3},
            ],
            "kernels": [
                step | {"variant": "plain torch", "graph_seconds": 4e-6},
                step | {"variant": "kernel", "graph_seconds": 2e-6, "bandwidth_share": 0.5},
                step | {"row": "down, tiny", "variant": "kernel", "graph_seconds": 1e-6},
            ],
            "ops": [
                step | {"variant": "x", "eager_seconds": 5e-3, "peak_extra_bytes": 2**20},
                step | {"variant": "ours, + pairs, fused head", "eager_seconds": 1.0},
            ],
            "predictions": [step | {"variant": "ours", "eager_seconds": 0.25}],
            "training": [
                step | {"variant": "ours", "eager_tokens_per_second": 5e4, "last_loss": 2.5},
                step | {"variant": "theirs", "status": "not run: not installed"},
            ],
            "eager": [step | {"variant": "PEFT", "host_seconds": 2e-3}],
            "host": [step | {"variant": "torch.mm", "host_seconds": 5e-6}],
            "profiles": [
                step | {"variant": "a", "kernels": [{"name": "k", "count": 2, "microseconds": 9.0}]}
            ],
        },
    }
    (tmp_path / "card.json").write_text(json.dumps(found))
    text = page.page(tmp_path)
    assert "1 of 2 checks passed. copy: 3 GB/s." in text and "- lora_down: wrong" in text
    assert "| tiny | 1 | 2 | 1 | 0.50 | - | - | - |" in text
    assert "| tiny | 2 | - | - | - | - | - | - |" in text
    assert "| tiny | 4.0 | 2.0 | 2.00 | 50% |" in text and "| tiny | x | 5 | 1 |" in text
    assert "| tiny | ours | 250 | - |" in text and "down, tiny" not in text
    assert "fused head" not in text
    assert "| tiny | ours | 50,000 | - | - | - | 2.5000 |  |" in text
    assert "| tiny | theirs | - | - | - | - | - | not run: not installed |" in text
    assert "| tiny | PEFT | 2 | - | - |  |" in text and "| torch.mm | 5 |" in text
    assert "| tiny | a | k | 2 | 9.0 |" in text


def test_what_waits_for_a_card_is_listed() -> None:
    row = {"row": next(iter(rows.TRAINING)), "variant": "ours", "status": "ok"}
    others = [row | {"row": name, "status": "not run: no time was left"} for name in rows.TRAINING]
    kernels = [row | {"row": "grad_s, Llama-3-8B gate/up"}]
    text = page.waiting([{"sections": {"training": [*others, row], "kernels": kernels}}])
    assert "1 x 2,048;" not in text and "- training: Qwen3-0.6B, 8 x 2,048;" in text
    assert "- grad_b, grad_a: kernels" in text
