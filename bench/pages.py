"""What the generated pages share: text, tables, the machines of their rows, writing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.results_file import Row, write_text

DOCS = Path(__file__).parent.parent / "docs"
NONE = "-"


def template(name: str) -> str:
    """What bench/texts has for a page."""
    return (Path(__file__).parent / "texts" / name).read_text(encoding="utf-8")


def texts(name: str) -> tuple[str, dict[str, str]]:
    """The same, taken apart: the lead, and for each section's title the words, to be wrapped."""
    lead, *sections = template(name).split("\n## ")
    pairs = (section.partition("\n") for section in sections)
    return lead.rstrip(), {title: words for title, _, words in pairs}


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """In Markdown, all columns but the first `left` ones to the right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, rule, *rows))


def wrapped(text: str, hanging: str = "") -> str:
    """One paragraph, its later lines indented by `hanging`."""
    words = " ".join(text.split())
    return textwrap.fill(words, 100, subsequent_indent=hanging, break_on_hyphens=False)


def packages(machine: Row) -> str:
    return ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)


def machines(rows: Mapping[str, Row]) -> str:
    """On what the rows were measured, a line for each machine, set of versions and date."""
    groups: dict[str, list[str]] = {}
    for name, row in rows.items():
        here = row["machine"]
        cpu = f"{here['cpu']} ({here['cpu_capability']}), {here['threads']} threads"
        gpu = f"{here['gpu']} beside " if here.get("gpu") else ""
        told = f"{gpu}{cpu}; Python {here['python']}, {packages(here)}; {here['date']}"
        groups.setdefault(told, []).append(name)
    if len(groups) == 1:
        return f"Measured on {next(iter(groups))}."
    *few, most = sorted(groups.items(), key=lambda group: len(group[1]))
    lines = [f"- {'; '.join(names)}: {told}." for told, names in few]
    return "\n".join(["Measured on:\n", *lines, f"- the other {len(most[1])} rows: {most[0]}."])


def write_page(path: Path, text: str) -> None:
    write_text(path, text)
    print(f"wrote {path.name}")
