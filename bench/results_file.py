"""Benchmark results as JSON under bench/results/, with the machine, the versions and the date.

Also what a benchmark reads off the machine: the resident memory of its own process.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adarank_fast.files import replacing

Row = Mapping[str, Any]
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


@contextmanager
def peak_resident() -> Iterator[list[int]]:
    """Bytes resident at the start, and at most until the end. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    found = [_status("VmRSS")]
    yield found
    found.append(_status("VmHWM"))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def read_results(name: str, folder: Path | None = None) -> dict[str, Row]:
    """The rows of bench/results/NAME.json; none if it is not there."""
    path = (folder or FOLDER) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_results(name: str, rows: Mapping[str, Row], keep: bool = True) -> None:
    """Put rows into bench/results/NAME.json, each with the machine; `keep` the others there."""
    here, content = machine(), read_results(name) if keep else {}
    content |= {key: {**row, "machine": here} for key, row in rows.items()}
    write_json(FOLDER / f"{name}.json", content)
    print(f"wrote {name}.json")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """To a temporary name, then renamed; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
