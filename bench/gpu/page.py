"""Writes docs/gpu.md from the files of `make bench-gpu` under bench/results/gpu/.

    python -m bench.gpu.page            (or `make gpu-page`)

A test compares the committed page with the committed files.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adarank_fast.files import replacing
from bench.benchmarks_page import machines, table
from bench.gpu.checks import DEFAULT
from bench.gpu.predictions import REPETITIONS, SAMPLE
from bench.gpu.report import card_rates
from bench.results_file import FOLDER

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
NONE = "-"
DELETED = re.compile(r"(down|fused|perturbed)\b.*|.*, ours, .*\b(down|fused)\b.*")  # row, variant
Row = Mapping[str, Any]

TEXT = """# On a GPU

What `make bench-gpu` measured where a card was at hand. Written by `make gpu-page` from the files
in `bench/results/gpu`; do not edit. [fusing.md](fusing.md) and [disagreement.md](disagreement.md)
say what follows from it. Every kernel and op was first checked against float64: an error of at most
twice plain PyTorch's in the same dtype, plus 1e-6 (of the largest value, where that is above 1).
Rows of code that has been deleted since (the kernels `down` and `fused`, the disagreement with the
head inside its kernel, the perturbed linear) are in the files only.
"""
BLOCKS = """
Forward and backward of one transformer block, {tokens} tokens, {dtype}, average rank 16, mixed;
medians of {repetitions}. Under a CUDA graph no launch is counted, only the card's own work; in
eager mode the step of a small model waits for Python. Overhead is a step less the frozen base's;
"float32" is PEFT's default, float32 adapters on the base. Ours has the kernels that run by default.
"""
KERNELS = """
Each kernel beside plain PyTorch on the same operands, under a CUDA graph; a share of what the
card's own copy moves a second, from the bytes that must be moved at least. Operands of a few
megabytes may wait in the cache: shares near or above 100%. `shrink` is used with dropout only.
"""
OPS = """
The disagreement of eight variants of 2,048 tokens through a head in a real model's shape, and extra
memory at its peak. `materialised` forms all outputs in the model's dtype; ours has float32 outputs
of differences, a chunk of tokens at a time.
"""
PREDICTIONS = """
`predict_ranks` of models in real shapes with random weights: 64 questions of 16 tokens and the mean
difference of the pooled state for MiniLM and MPNet-base, five trials a module; 2,048 tokens and
total variation of all logits for the language models, one trial; medians of {repetitions}.
Before it is timed, its scores are checked against a naive loop in float64. The naive loop, full
forwards and full outputs, is extrapolated from {sample} probes across the depth.
"""


def _milliseconds(row: Row | None, key: str) -> str:
    return f"{row[key] * 1e3:.3g}" if row and key in row else NONE


def _kept(rows: Sequence[Row]) -> list[Row]:
    """Without those of code that is gone."""
    return [row for row in rows if not DELETED.fullmatch(f"{row['row']}, {row['variant']}")]


def _variants(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Row -> variant -> what was measured."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["row"], {})[row["variant"]] = row
    return found


def _overheads(found: Mapping[str, Row], timer: str) -> list[str]:
    """Frozen, PEFT's and our overhead, their ratio; the same for float32 adapters."""
    key = f"{timer}_seconds"
    frozen = found.get("frozen")
    cells = [_milliseconds(frozen, key)]
    for peft, ours in (
        ("peft", f"ours, {DEFAULT}"),
        ("peft, float32 adapters", f"ours, float32 adapters, {DEFAULT}"),
    ):
        both = [found.get(name) for name in (peft, ours)]
        if frozen is None or any(row is None or key not in row for row in (*both, frozen)):
            cells += [NONE] * 3
            continue
        theirs, mine = (row[key] - frozen[key] for row in both if row)
        cells += [f"{theirs * 1e3:.3g}", f"{mine * 1e3:.3g}", f"{mine / theirs:.2f}"]
    return cells


def blocks(rows: Sequence[Row], timer: str) -> str:
    header = ("one block", "frozen, ms", "PEFT +ms", "ours +ms", "ours / PEFT")
    header += ("PEFT float32 +ms", "ours float32 +ms", "ours / PEFT")
    lines = [[row, *_overheads(found, timer)] for row, found in _variants(rows).items()]
    return table(header, lines)


def kernels(rows: Sequence[Row]) -> str:
    lines = []
    for row, found in _variants(rows).items():
        plain, kernel = (found.get(name) for name in ("plain torch", "kernel"))
        cells = [_microseconds(plain), _microseconds(kernel)]
        if plain and kernel and "graph_seconds" in plain and "graph_seconds" in kernel:
            cells.append(f"{plain['graph_seconds'] / kernel['graph_seconds']:.2f}")
        else:
            cells.append(NONE)
        share = kernel and kernel.get("bandwidth_share")
        lines.append([row, *cells, f"{share:.0%}" if share else NONE])
    return table(("kernel", "torch, us", "kernel, us", "torch / kernel", "of bandwidth"), lines)


def _microseconds(row: Row | None) -> str:
    return f"{row['graph_seconds'] * 1e6:,.1f}" if row and "graph_seconds" in row else NONE


def ops(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        peak = row.get("peak_extra_bytes")
        extra = f"{peak / 2**20:,.0f}" if peak else NONE
        lines.append([row["row"], row["variant"], _milliseconds(row, "eager_seconds"), extra])
    return table(("op", "how", "eager, ms", "extra memory, MiB"), lines)


def card(found: Mapping[str, Any]) -> str:
    """One file's section."""
    here, options = found["machine"], found["options"]
    sections = {name: _kept(rows) for name, rows in found["sections"].items()}
    tokens = f"{options['tokens'][0]} x {options['tokens'][1]:,}"
    told = options | {"tokens": tokens}
    passed = sum(check["status"] == "passed" for check in found["checks"])
    only = f", --only {options['only']}" if options.get("only") else ""
    parts = [f"## {here['card']}{only}"]
    lead = f"{passed} of {len(found['checks'])} checks passed. {card_rates(sections['card'])}. "
    parts.append(_wrapped(lead + machines({"all": found})))
    parts += [f"- {line}" for line in found["failures"]]
    if sections.get("blocks"):
        parts += [_wrapped(BLOCKS.format(**told)), "Under a CUDA graph:"]
        parts += [blocks(sections["blocks"], "graph"), "In eager mode:"]
        parts.append(blocks(sections["blocks"], "eager"))
    if sections.get("kernels"):
        parts += [_wrapped(KERNELS), kernels(sections["kernels"])]
    if sections.get("ops"):
        parts += [_wrapped(OPS), ops(sections["ops"])]
    if sections.get("predictions"):
        timed = min(REPETITIONS, options["repetitions"])
        parts += [
            _wrapped(PREDICTIONS.format(sample=SAMPLE, repetitions=timed)),
            ops(sections["predictions"]),
        ]
    return "\n\n".join(parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


def page(folder: Path = FOLDER / "gpu") -> str:
    """The whole page, of the files in `folder`."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    cards = [card(found) for found in files] or [
        "No card yet: `make bench-gpu` on one writes a file."
    ]
    return "\n\n".join([TEXT.rstrip(), *cards]) + "\n"


def main() -> None:
    text = page()
    with replacing(PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
