"""Benchmark results as JSON under bench/results/, with the machine, the versions and the date."""

from __future__ import annotations

import datetime
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adarank_fast.files import replacing

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("adarank-fast", "torch", "triton", "transformers", "peft")


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": models[0] if models else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def write_results(name: str, row: str, figures: dict[str, Any]) -> Path:
    """Put one row into bench/results/NAME.json; the other rows stay."""
    path = FOLDER / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content[row] = {**figures, "machine": machine()}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path


def write_all(name: str, rows: dict[str, dict[str, Any]]) -> Path:
    """Replace bench/results/NAME.json by these rows."""
    path, here = FOLDER / f"{name}.json", machine()
    content = {key: {**row, "machine": here} for key, row in rows.items()}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
