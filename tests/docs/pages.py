"""The pages with examples, and their blocks, as Sybil finds them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
# written by `make benchmarks-page` and the like, of figures only
GENERATED = {
    *("benchmarks.md", "compatibility.md", "gpu.md", "kernels.md", "reliability.md", "results.md"),
}


def pages() -> list[Path]:
    """README.md and every page of docs/ that a person writes."""
    written = [path for path in (ROOT / "docs").rglob("*.md") if path.name not in GENERATED]
    return [ROOT / "README.md", *sorted(written)]


def parse(page: Path, run_bash: Callable[[Example], None]) -> Document:
    """The page's Python blocks, which share one namespace, and its bash blocks."""
    parsers = [PythonCodeBlockParser(), CodeBlockParser("bash", run_bash)]
    return Sybil(parsers).parse(page)


def commands(block: str) -> list[list[str]]:
    """The arguments of each `adarank` in a bash block, comments and `torchrun -m` taken off."""
    block = block.replace("\\\n", " ")
    block = re.sub(r"^torchrun .*-m adarank_fast ", "adarank ", block, flags=re.M)
    lines = re.findall(r"^adarank (.*)$", block, re.M)
    return [shlex.split(line, comments=True) for line in lines]
