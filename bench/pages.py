"""What the generated pages share: text, tables, the machines of their rows, writing."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from adarank_fast.files import replacing
from bench.results_file import Row

DOCS = Path(__file__).parent.parent / "docs"
NONE = "-"


def texts(name: str) -> tuple[str, dict[str, str]]:
    """What bench/texts has for a page: its lead, and for each section's title the words."""
    text = (Path(__file__).parent / "texts" / name).read_text(encoding="utf-8")
    lead, *sections = text.split("\n## ")
    pairs = (section.partition("\n") for section in sections)
    return lead.rstrip(), {title: wrapped(words) for title, _, words in pairs}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, all columns but the first one to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def wrapped(text: str, hanging: str = "") -> str:
    """One paragraph, its later lines indented by `hanging`."""
    words = " ".join(text.split())
    return textwrap.fill(words, 100, subsequent_indent=hanging, break_on_hyphens=False)


def machines(rows: Mapping[str, Row]) -> str:
    """On what the rows were measured, a line for each machine, set of versions and date."""
    groups: dict[str, list[str]] = {}
    for name, row in rows.items():
        here = row["machine"]
        packages = ", ".join(f"{p} {number}" for p, number in here["versions"].items() if number)
        cpu = f"{here['cpu']} ({here['cpu_capability']}), {here['threads']} threads"
        gpu = f"{here['gpu']} beside " if here.get("gpu") else ""
        told = f"{gpu}{cpu}; Python {here['python']}, {packages}; {here['date']}"
        groups.setdefault(told, []).append(name)
    if len(groups) == 1:
        return f"Measured on {next(iter(groups))}."
    *few, most = sorted(groups.items(), key=lambda group: len(group[1]))
    lines = [f"- {'; '.join(names)}: {told}." for told, names in few]
    return "\n".join(["Measured on:\n", *lines, f"- the other {len(most[1])} rows: {most[0]}."])


def write_page(path: Path, text: str) -> None:
    """Replace the page."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {path.name}")
