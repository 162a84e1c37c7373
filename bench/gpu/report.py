"""The table on the screen and the file to send back."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adarank_fast.files import replacing
from bench.gpu.checks import Check
from bench.gpu.context import Row, best_seconds
from bench.gpu.timing import OUT_OF_MEMORY
from bench.results_file import FOLDER, machine

FORMAT = 1  # of the file
NO_FAILURE = ("ok", OUT_OF_MEMORY, "not used in float32", "no Triton here")


def card_facts(device: torch.device) -> dict[str, Any]:
    """What the figures must be read with, beside `machine`."""
    facts: dict[str, Any] = {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    if device.type != "cuda":
        return facts | {"card": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return facts | {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "architecture": getattr(properties, "gcnArchName", None) if torch.version.hip else None,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cache_bytes": getattr(properties, "L2_cache_size", None),
        "driver": driver(),
        "cudnn": torch.backends.cudnn.version(),
    }


def driver() -> str | None:
    """The version of the GPU's driver, if it tells."""
    if torch.version.hip:
        path = Path("/sys/module/amdgpu/version")
        return path.read_text().strip() if path.is_file() else None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = found.stdout.strip().splitlines()
    return lines[0].strip() if found.returncode == 0 and lines else None


def default_path(card: str, date: str) -> Path:
    """bench/results/gpu/CARD-DATE.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") or "card"
    return FOLDER / "gpu" / f"{slug}-{date}.json"


def content(
    facts: dict[str, Any],
    options: dict[str, Any],
    checks: Sequence[Check],
    sections: dict[str, list[Row]],
    finished: bool,
) -> dict[str, Any]:
    """Everything that the file holds."""
    return {
        "format": FORMAT,
        "machine": machine() | facts,
        "options": options,
        "finished": finished,
        "failures": failures(checks, sections),
        "checks": list(checks),
        "sections": sections,
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """To a temporary name, then renamed."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


def failures(checks: Sequence[Check], sections: dict[str, list[Row]]) -> list[str]:
    """One line for each check or row that failed; too little memory is no failure."""
    lines = [
        f"{c['op']}, {c['case']}, {c['kernels']}, {c['dtype']}: {c['status']}"
        for c in checks
        if c["status"] != "passed"
    ]
    return lines + [
        f"{row['row']}, {row['variant']}: {row['status']}"
        for rows in sections.values()
        for row in rows
        if row["status"] not in NO_FAILURE
    ]


def checks_table(checks: Sequence[Check]) -> Table:
    """A line for each op and dtype, and one for each failure."""
    table = Table(title="Checks against float64: error at most twice plain PyTorch's, plus 1e-6")
    for heading in ("op or kernel", "dtype", "passed", "largest share of the allowed error"):
        table.add_column(heading)
    for op, dtype in dict.fromkeys((c["op"], c["dtype"]) for c in checks):
        some = [c for c in checks if (c["op"], c["dtype"]) == (op, dtype)]
        passed = [c for c in some if c["status"] == "passed"]
        shares = [c["share"] for c in passed if c["share"] is not None]
        worst = f"{max(shares):.2f}" if shares else ""
        table.add_row(op, dtype, f"{len(passed)} of {len(some)}", worst)
    for c in checks:
        if c["status"] != "passed":
            where = f"{c['op']}: {c['case']}, {c['kernels']}"
            table.add_row(escape(where), c["dtype"], "[red]no[/red]", escape(c["status"]))
    return table


COLUMNS = {  # key of a row -> heading, text
    "eager_seconds": ("eager ms", lambda v: f"{v * 1e3:.4g}"),
    "eager_overhead": ("over frozen", lambda v: f"{v:+.1%}"),
    "graph_seconds": ("graph ms", lambda v: f"{v * 1e3:.4g}"),
    "graph_overhead": ("over frozen", lambda v: f"{v:+.1%}"),
    "bandwidth_share": ("of the card's bandwidth", lambda v: f"{v:.0%}"),
    "matmul_share": ("of its matmul rate", lambda v: f"{v:.0%}"),
    "peak_extra_bytes": ("extra memory", lambda v: f"{v / 2**20:,.0f} MiB"),
}


def section_table(title: str, rows: Sequence[Row]) -> Table:
    """One section: the columns that any of its rows has."""
    columns = {k: v for k, v in COLUMNS.items() if any(row.get(k) is not None for row in rows)}
    table = Table(title=title)
    table.add_column("row")
    table.add_column("variant")
    for heading, _ in columns.values():
        table.add_column(heading, justify="right")
    table.add_column("note")
    last = None
    for row in rows:
        if last not in (None, row["row"]):
            table.add_section()
        cells = [text(row[k]) if row.get(k) is not None else "" for k, (_, text) in columns.items()]
        notes = [row["status"]] if row["status"] != "ok" else []
        notes += [f"no graph: {row['graph']}"] if "graph" in row else []
        shown = row["row"] if row["row"] != last else ""
        table.add_row(escape(shown), escape(row["variant"]), *cells, escape("; ".join(notes)))
        last = row["row"]
    return table


def show(console: Console, found: dict[str, Any], path: Path, titles: dict[str, str]) -> None:
    """Everything, the failures last."""
    here = found["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in here["versions"].items() if v)
    console.print(
        f"{here['card']}, driver {here.get('driver')}, {here['date']}, {versions}", markup=False
    )
    console.print(checks_table(found["checks"]))
    for name, rows in found["sections"].items():
        if rows:
            console.print(section_table(titles.get(name, name), rows))
    rates = card_rates(found["sections"].get("card", []))
    if rates:
        console.print(rates, markup=False)
    for line in found["failures"]:
        console.print(f"FAILED {line}", style="red", markup=False)
    state = "written to" if found["finished"] else "not finished; what there is was written to"
    console.print(f"{state} {path}", markup=False, soft_wrap=True)


def card_rates(rows: Iterable[Row]) -> str:
    """The card's own bandwidth and matmul rate in words."""
    said = []
    for row in rows:
        seconds = best_seconds(row)
        if seconds and row.get("flops"):
            said.append(f"{row['variant']}: {row['flops'] / seconds / 1e12:.4g} TFLOP/s")
        elif seconds:
            said.append(f"{row['variant']}: {row['bytes'] / seconds / 1e9:,.4g} GB/s")
    return "; ".join(said)
