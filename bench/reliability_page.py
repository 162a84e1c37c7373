"""Writes docs/reliability.md from what `make soak` found, in bench/results/reliability.json.

    python -m bench.reliability_page            (or `make reliability-page`)

Its words are in bench/texts. It says nothing that the file does not; an arm that is not in it is
"not run yet". A test compares page and file.
"""

from __future__ import annotations

from pathlib import Path

from bench.pages import DOCS, NONE, machines, table, texts, wrapped, write_page
from bench.results_file import Row, read_results

PAGE = DOCS / "reliability.md"
# Name: its title in the page's words, the count that says how much was tried, how much is enough.
# Where a row has a count "all ...", too, that is how much there is.
ARMS = {
    "kills": ("Kills", "kills", "200"),
    "disk": ("Full and read-only disks", "disk faults", "every write, twice"),
    "exceptions": ("Exceptions", "call sites", "every call site, twice"),
    "inputs": ("Files of strangers", "changed files", "1,000,000"),
    "growth": ("Growth", "training steps", "20,000"),
    "threads": ("Threads", "requests", "20,000"),
    "processes": ("Processes", "processes", "50"),
}


def line(name: str, row: Row | None) -> list[str]:
    """An arm in the first table."""
    title, key, goal = ARMS[name]
    if row is None:
        return [f"{title}: not run yet", NONE, goal, NONE, NONE, NONE]
    counts = row["counts"]
    of = f" of {counts[f'all {key}']:,}" if f"all {key}" in counts else ""
    tried = f"{counts[key]:,}{of} {key}" if key in counts else NONE
    found = f"**{row['faults']}**" if row["faults"] else "0"
    return [title, tried, goal, found, f"{row['minutes']:.1f}", row["machine"]["date"]]


def section(name: str, words: str, row: Row | None) -> str:
    """An arm: what it does, all its counts, the first faults in words."""
    title = ARMS[name][0]
    command = f'`make soak ARGS="--only {name}"`'
    parts = [f"## {title}", wrapped(f"{words} {command} runs it alone.")]
    if row is not None:
        counts = "; ".join(f"{what}: {count:,}" for what, count in row["counts"].items())
        parts.append(wrapped(f"{counts or 'It did not end'}. Seed {row['seed']}."))
        parts += ["\n".join(["```text", fault.strip(), "```"]) for fault in row["shown"]]
    return "\n\n".join(parts)


def page(folder: Path | None = None) -> str:
    """The whole page, of the file in `folder`, or of that of the repository."""
    lead, words = texts(PAGE.name)
    rows = read_results("reliability", folder)
    header = ("what is tried", "tried", "a whole run", "faults", "minutes", "date")
    parts = [
        lead,
        table(header, [line(name, rows.get(name)) for name in ARMS]),
        *(section(name, words[ARMS[name][0]], rows.get(name)) for name in ARMS),
    ]
    if rows:
        parts += ["## Machine", machines(rows)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    write_page(PAGE, page())
