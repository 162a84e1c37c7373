"""The report of a comparison: on a terminal, and as files."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adarank_fast.comparison.findings import reading, tables
from adarank_fast.comparison.numbers import Results
from adarank_fast.comparison.report_writer import save_report
from adarank_fast.models.text import plain_text
from adarank_fast.plan.rank_plan import RankPlan

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Comparison:
    """The report of `compare`.

    Attributes:
        results: all numbers, as results.json has them.
        plans: arm -> its plan.
    """

    results: Results
    plans: dict[str, RankPlan]

    def table(self) -> str:
        """The tables and the findings as fixed-width text."""
        return "\n".join([plain_text(*rich_tables(self.results)), *reading(self.results)])

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
        one = RichTable(
            box=box.SIMPLE, title=title, title_justify="left", pad_edge=False, collapse_padding=True
        )
        for column, cells in zip(header, zip(*rows, strict=True), strict=True):
            parts = column.replace(" (", "\n(").split("\n")
            width = max(map(len, (*cells, *column.split(" "))))
            name = "\n".join(textwrap.fill(part, width) for part in parts)
            if column == "arm":  # which gives way where the terminal is narrow
                one.add_column(name, overflow="fold")
            else:
                one.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            one.add_row(*row)
        made.append(one)
    return made
