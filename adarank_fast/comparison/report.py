"""The report of a comparison: on a terminal, and as files."""

from __future__ import annotations

import html
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adarank_fast.comparison.findings import reading, tables
from adarank_fast.comparison.numbers import Results
from adarank_fast.comparison.report_writer import save_report
from adarank_fast.models.text import WIDTH, data_frame, plain_text
from adarank_fast.plan.rank_plan import RankPlan

if TYPE_CHECKING:
    import pandas
    from rich.table import Table as RichTable

NAMES = 24  # columns for the arms' names, where the others leave that
EDGES, GAP = 2, 2  # columns at a table's sides, and between two of its columns


@dataclass(frozen=True, repr=False)
class Comparison:
    """The report of `compare`.

    Attributes:
        results: all numbers, as results.json has them.
        plans: arm -> its plan.
    """

    results: Results
    plans: dict[str, RankPlan]

    def table(self) -> str:
        """The tables and what they say as text of at most 80 columns."""
        said = [textwrap.fill(line, WIDTH) for line in reading(self.results)]
        return "\n".join([plain_text(*rich_tables(self.results)), *said])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        settings = self.results["settings"]
        return (
            f"Comparison({settings['title']!r}: {', '.join(self.results['arms'])}; "
            f"{len(settings['seeds'])} seeds); .table(), .save(folder)"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"

    def to_frame(self) -> pandas.DataFrame:
        """A row for each arm: its metric, its difference from the baseline, its cost.

        Intervals are of 95%, over seeds; None where a run diverged or there is one seed.

        Raises:
            AdarankImportError: pandas is not installed.
        """
        metric = self.results["settings"]["metric"]
        minus = f"minus_{self.results['baseline']}"
        rows: dict[str, dict[str, object]] = {}
        for arm, numbers in self.results["arms"].items():
            difference = self.results["differences"].get(arm)
            spans = {metric: numbers["value"], minus: difference and difference["seeds"]}
            row: dict[str, object] = {}
            for name, found in spans.items():
                row[name] = found and found["mean"]
                row |= {f"{name}_{end}": found and found[end] for end in ("low", "high")}
            row["p_value"] = difference and difference["seeds"]["p_value"]
            cost = {k: v for k, v in numbers.items() if not isinstance(v, dict) and k != "value"}
            rows[arm] = row | cost
        return data_frame(rows)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write report.md, report.html, results.json, pictures and plans into `folder`.

        Each file appears whole or not at all. report.html needs no other file.

        Args:
            folder: a new or empty one, or an earlier comparison's.

        Raises:
            AdarankError: it is of something else, or holds the runs of another comparison.
        """
        save_report(folder, self.results, self.plans)


def rich_tables(results: Results) -> list[RichTable]:
    """The tables that the command prints."""
    from rich import box
    from rich.table import Table as RichTable

    made = []
    for title, header, rows in tables(results):
        titles = [title]
        for columns in _side_by_side(header, rows):
            one = RichTable(
                box=box.SIMPLE,
                title=titles.pop() if titles else None,
                title_justify="left",
                pad_edge=False,
                collapse_padding=True,
            )
            for place in columns:
                if place:
                    name = _stacked(header[place], _width(header[place], rows, place))
                    one.add_column(name, justify="right", no_wrap=True)
                else:
                    one.add_column(header[0], overflow="fold")
            for row in rows:
                one.add_row(*(row[place] for place in columns))
            made.append(one)
    return made


def _side_by_side(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[int]]:
    """Columns for one table after the other, each with the arms first, of at most `WIDTH`."""
    arms = min(_width(header[0], rows, 0), NAMES)
    parts, room = [[0]], WIDTH - EDGES - arms
    for place in range(1, len(header)):
        needed = GAP + _width(header[place], rows, place)
        if needed > room and len(parts[-1]) > 1:
            parts.append([0])
            room = WIDTH - EDGES - arms
        parts[-1].append(place)
        room -= needed
    return parts


def _width(header: str, rows: Sequence[Sequence[str]], place: int) -> int:
    """Of a column, its header broken between words."""
    return max(map(len, (*(row[place] for row in rows), *header.split(" "))))


def _stacked(header: str, width: int) -> str:
    parts = header.replace(" (", "\n(").split("\n")
    return "\n".join(textwrap.fill(part, width) for part in parts)
