"""Writes docs/gpu.md from the files of `make bench-gpu` under bench/results/gpu/.

    python -m bench.gpu.page            (or `make gpu-page`)

Its words are in bench/texts. A test compares the committed page with the committed files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.checks import DEFAULT, WAITING
from bench.gpu.context import best_seconds
from bench.gpu.predictions import APART, REPETITIONS, SAMPLE
from bench.gpu.rows import SECTIONS
from bench.pages import DOCS, NONE, machines, table, texts, wrapped, write_page
from bench.results_file import FOLDER, Row

PAGE = DOCS / "gpu.md"
DELETED = re.compile(r"(down|fused|perturbed)\b.*|.*, ours, .*\b(down|fused)\b.*")  # row, variant
OVERHEADS = {"peft": f"ours, {DEFAULT}"}
OVERHEADS["peft, float32 adapters"] = f"ours, float32 adapters, {DEFAULT}"


def number(row: Row | None, key: str, scale: float, form: str = ".3g") -> str:
    return f"{row[key] * scale:{form}}" if row and row.get(key) else NONE


def by_variant(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Row -> variant -> what was measured."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["row"], {})[row["variant"]] = row
    return found


def overheads(found: Mapping[str, Row], key: str) -> list[str]:
    """The frozen step, PEFT's and our overhead, their ratio; the same for float32 adapters."""
    seconds = {name: row[key] for name, row in found.items() if key in row}
    cells = [number(found.get("frozen"), key, 1e3)]
    for peft, ours in OVERHEADS.items():
        if {"frozen", peft, ours} <= seconds.keys():
            theirs, mine = (seconds[name] - seconds["frozen"] for name in (peft, ours))
            cells += [f"{theirs * 1e3:.3g}", f"{mine * 1e3:.3g}", f"{mine / theirs:.2f}"]
        else:
            cells += [NONE] * 3
    return cells


def blocks(rows: Sequence[Row]) -> str:
    header = ("one block", "frozen, ms", "PEFT +ms", "ours +ms", "ours / PEFT")
    header += ("PEFT float32 +ms", "ours float32 +ms", "ours / PEFT")
    found = by_variant(rows).items()
    graph, eager = (
        table(header, [(row, *overheads(mine, f"{timer}_seconds")) for row, mine in found])
        for timer in ("graph", "eager")
    )
    return f"Under a CUDA graph:\n\n{graph}\n\nIn eager mode:\n\n{eager}"


def kernels(rows: Sequence[Row]) -> str:
    key, lines = "graph_seconds", []
    for row, found in by_variant(rows).items():
        plain, kernel = found.get("plain torch", {}), found.get("kernel", {})
        ratio = f"{plain[key] / kernel[key]:.2f}" if key in plain and key in kernel else NONE
        times = (number(one, key, 1e6, ",.1f") for one in (plain, kernel))
        lines.append((row, *times, ratio, number(kernel, "bandwidth_share", 1, ".0%")))
    return table(("kernel", "torch, us", "kernel, us", "torch / kernel", "of bandwidth"), lines)


def ops(rows: Sequence[Row]) -> str:
    lines = [
        (row["row"], row["variant"], number(row, "eager_seconds", 1e3))
        + (number(row, "peak_extra_bytes", 2**-20, ",.0f"),)
        for row in rows
    ]
    return table(("op", "how", "eager, ms", "extra memory, MiB"), lines)


def host(rows: Sequence[Row]) -> str:
    lines = [(row["variant"], number(row, "host_seconds", 1e6)) for row in rows]
    return table(("one call", "microseconds"), lines)


def eager(rows: Sequence[Row]) -> str:
    lines = [
        (row["row"].removesuffix(", host"), row["variant"])
        + (number(row, "host_seconds", 1e3), number(row, "eager_seconds", 1e3))
        + (number(row, "peak_extra_bytes", 2**-20, ",.0f"), said(row))
        for row in rows
    ]
    return table(("one block", "how", "host, ms", "eager, ms", "MiB", ""), lines, left=2)


def profiles(rows: Sequence[Row]) -> str:
    lines = [
        (row["row"], row["variant"], kernel["name"].replace("|", "/")[:60])
        + (f"{kernel['count']:.3g}", f"{kernel['microseconds']:,.1f}")
        for row in rows
        for kernel in row.get("kernels", ())[:LISTED]
    ]
    return table(("of", "how", "kernel", "calls", "us"), lines, left=3)


def steps(rows: Sequence[Row]) -> str:
    lines = [
        (row["row"], row["variant"])
        + tuple(number(row, f"{t}_tokens_per_second", 1, ",.0f") for t in ("eager", "graph"))
        + (number(row, "peak_extra_bytes", 2**-20, ",.0f"), number(row, "launches", 1, ",.0f"))
        + (number(row, "last_loss", 1, ".4f"), said(row))
        for row in rows
    ]
    header = (
        "a step",
        "how",
        "eager, tokens/s",
        "graphed, tokens/s",
        "MiB",
        "launches",
        "loss",
        "",
    )
    return table((*header, ""), lines, left=2)


def said(row: Row) -> str:
    """Why there are no figures, or not all."""
    notes = [row["status"], f"no graph: {row['graph']}" if "graph" in row else "ok"]
    return "; ".join(note for note in notes if note != "ok").replace("|", "/")


TABLES = {
    "training": steps,
    "qlora": steps,
    "blocks": blocks,
    "eager": eager,
    "host": host,
    "kernels": kernels,
    "profiles": profiles,
    "ops": ops,
    "predictions": ops,
}  # the section's words are in bench/texts
LISTED = 12  # kernels of a profile


def waiting(files: Sequence[Mapping[str, Any]]) -> str:
    """The jobs that no file has a figure of, a line for each section."""
    done = {
        row["row"] for found in files for rows in found["sections"].values() for row in rows
        if not row["status"].startswith("not run")
    }  # fmt: skip
    lines = []
    for section, names in SECTIONS.items():
        missing = [name for name in names if name not in done]
        if section in NAMED_OTHERWISE and files:
            missing = []
        if missing:
            lines.append(wrapped(f"- {section}: {'; '.join(missing)}", hanging="  "))
    kernels = [row for found in files for row in found["sections"].get("kernels", ())]
    timed = {row["row"].partition(",")[0] for row in kernels}
    names = [name.removeprefix("lora_") for name in WAITING]
    if unjudged := [name for name in names if name not in timed]:
        lines.append(wrapped(f"- {', '.join(unjudged)}: {VERDICT}", hanging="  "))
    predictions = [row for found in files for row in found["sections"].get("predictions", ())]
    if predictions and not any(APART in row["variant"] for row in predictions):
        lines.append(wrapped(f"- predictions: {JOINED}", hanging="  "))
    if not lines:
        return ""
    return "\n\n".join(["## What waits for a card", texts(PAGE.name)[1]["waiting"].strip(),
                        "\n".join(lines)])  # fmt: skip


VERDICT = (
    "kernels of a group's backward pass that run nowhere until a card has given its verdict; the "
    'rows "kernels" time them beside the vendor\'s GEMMs, the rows "blocks" with "+ backward"'
)
JOINED = (
    "whether blocks whose work is little should be joined, as they are since the figures above: "
    f'"ours" beside "ours, {APART}"'
)
NAMED_OTHERWISE = ("kernels",)  # its rows say what was timed of a job


def card_rates(rows: Sequence[Row]) -> str:
    """The card's own bandwidth and matmul rate in words."""
    said = []
    for row in rows:
        seconds = best_seconds(row)
        if seconds and row.get("flops"):
            said.append(f"{row['variant']}: {row['flops'] / seconds / 1e12:.4g} TFLOP/s")
        elif seconds:
            said.append(f"{row['variant']}: {row['bytes'] / seconds / 1e9:,.4g} GB/s")
    return "; ".join(said)


def card(found: Mapping[str, Any]) -> str:
    """One file's section."""
    here, options, sections = found["machine"], found["options"], found["sections"]
    passed = sum(check["status"] == "passed" for check in found["checks"])
    only = f", --only {options['only']}" if options.get("only") else ""
    if options.get("part"):
        only = f", part {options['part']}"
    rates = card_rates(sections["card"])
    lead = f"{passed} of {len(found['checks'])} checks passed. {rates}. {machines({'all': found})}"
    parts = [f"## {here['card']}{only}", wrapped(lead)]
    parts += [f"- {line}" for line in found["failures"]]
    found_rivals = here.get("rivals") or {}
    others = ", ".join(f"{name} {number}" for name, number in found_rivals.items() if number)
    if others:
        parts.append(wrapped(f"Beside them: {others}."))
    told = options | {"tokens": "{} x {:,}".format(*options["tokens"]), "sample": SAMPLE}
    _, words = texts(PAGE.name)
    for name, told_of in TABLES.items():
        rows = sections.get(name, [])
        rows = [r for r in rows if not DELETED.fullmatch(f"{r['row']}, {r['variant']}")]
        if name == "predictions":
            told["repetitions"] = min(REPETITIONS, told["repetitions"])
        if rows:
            parts += [wrapped(words[name].format(**told)), told_of(rows)]
    return "\n\n".join(parts)


def page(folder: Path = FOLDER / "gpu") -> str:
    """The whole page, of the files in `folder`."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    parts = [card(found) for found in files] or ["No card yet: `make bench-gpu` writes a file."]
    return "\n\n".join(filter(None, [texts(PAGE.name)[0], *parts, waiting(files)])) + "\n"


if __name__ == "__main__":
    write_page(PAGE, page())
