"""The file to send back: what a run found, and the card that it found it on."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import rivals
from bench.gpu.checks import Check
from bench.gpu.context import Row
from bench.gpu.timing import OUT_OF_MEMORY
from bench.results_file import FOLDER, machine

FORMAT = 1  # of the file
NO_TIME = "no time was left"
NO_FAILURE = ("ok", OUT_OF_MEMORY, "not used in float32", "no Triton here")


def card_facts(device: torch.device) -> dict[str, Any]:
    """What the figures must be read with, beside `machine`."""
    facts: dict[str, Any] = {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "rivals": rivals.versions(),
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
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(found.stdout.split()), None)


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


def failures(checks: Sequence[Check], sections: dict[str, list[Row]]) -> list[str]:
    """One line for each check or row that failed; too little memory or time is no failure."""
    lines = [
        f"{c['op']}, {c['case']}, {c['kernels']}, {c['dtype']}: {c['status']}"
        for c in checks
        if c["status"] != "passed"
    ]
    rows = [row for some in sections.values() for row in some if _failed(row["status"])]
    return lines + [f"{row['row']}, {row['variant']}: {row['status']}" for row in rows]


def _failed(status: str) -> bool:
    lost = status.startswith("not run: the card")
    return lost or not (status in NO_FAILURE or status.startswith("not run: "))


def notes(sections: dict[str, list[Row]]) -> list[str]:
    """One line for each row that was not timed, or not as a graph."""
    return [
        f"{row['row']}, {row['variant']}: {why}"
        for rows in sections.values()
        for row in rows
        for why in (row["status"], f"no graph: {row.get('graph', 'ok')}")
        if not why.endswith("ok")
    ]
