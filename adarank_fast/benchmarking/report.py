"""A benchmark's result: on a terminal, in a notebook, and as files."""

from __future__ import annotations

import html
import json
import os
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from adarank_fast.benchmarking.arms import FLOORS, OURS
from adarank_fast.errors import AdarankError
from adarank_fast.files import own_folder, write_text, writing
from adarank_fast.models.text import data_frame, plain_text
from adarank_fast.plots.runs import plot_intervals

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

KIND = "benchmark"  # its mark
MIB = 2**20


class Interval(TypedDict):
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


class Row(TypedDict, total=False):
    """The numbers of one variant; see `Benchmark`. `why`: it was not timed, and why."""

    adapter_parameters: int
    why: str
    milliseconds: Interval
    tokens_per_second: float
    overhead: Interval
    overhead_over_peft: Interval | None
    difference_from_peft: float
    error_in_float64: float
    peak_bytes: int
    seconds: list[float]


class Settings(TypedDict):
    """What was timed."""

    dtype: str
    tokens: int
    shape: list[int]
    data: str
    ranks: list[int]
    modules: int
    repetitions: int


class Machine(TypedDict):
    """Where it was timed."""

    device: str
    system: str
    threads: int
    versions: dict[str, str]


class Results(TypedDict):
    """What results.json has."""

    model: str
    settings: Settings
    machine: Machine
    arms: dict[str, Row]
    notes: list[str]


@dataclass(frozen=True)
class Benchmark:
    """The report of `benchmark`.

    Attributes:
        results: all numbers, as results.json has them: of each variant milliseconds a step,
            tokens_per_second, overhead over the frozen base (0.2: a fifth more time), its ratio
            to PEFT's overhead in the same dtype, peak_bytes of a step in addition to what is held
            before it, and every repetition's seconds. Intervals are 95% bootstrap intervals.
    """

    results: Results

    def __getitem__(self, arm: str) -> Row:
        """The numbers of a variant, such as "ours"."""
        arms = self.results["arms"]
        if arm not in arms:
            raise AdarankError(f"{arm!r} was not benchmarked; there are {', '.join(arms)}")
        return arms[arm]

    def table(self) -> str:
        """The table and the conclusions as fixed-width text of at most 80 columns."""
        said = [textwrap.fill(line, 80, subsequent_indent="  ") for line in self.reading()]
        return "\n".join([self._title(), plain_text(self._rich(), width=80), *said])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        arms = self.results["arms"]
        return f"Benchmark({self.results['model']!r}, {', '.join(arms)}); .table(), .save(folder)"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"

    def to_frame(self) -> pandas.DataFrame:
        """A pandas DataFrame, a row for each variant.

        Raises:
            AdarankImportError: pandas is not installed.
        """
        rows: dict[str, dict[str, object]] = {}
        for name, numbers in self.results["arms"].items():
            row = rows[name] = {
                key: value for key, value in numbers.items() if isinstance(value, (int, float, str))
            }
            for key in ("milliseconds", "overhead", "overhead_over_peft"):
                found = numbers.get(key)
                interval = found if isinstance(found, dict) else {}
                for column, end in ((key, "value"), (f"{key}_low", "low"), (f"{key}_high", "high")):
                    row[column] = interval.get(end)
        return data_frame(rows)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write table.txt, results.json and steps.png into `folder`.

        Args:
            folder: a new or empty one, or an earlier benchmark's.

        Raises:
            AdarankError: it is of something else.
        """
        with own_folder(folder, KIND) as mine, writing(folder):
            rows = {
                name: ([1e3 * s for s in n["seconds"]], n["milliseconds"]["low"],
                       n["milliseconds"]["high"])
                for name, n in self.results["arms"].items()
                if "seconds" in n
            }  # fmt: skip
            plot_intervals(rows, mine / "steps.png", "ms a training step")
            text = json.dumps(self.results, indent=1, allow_nan=False)
            write_text(mine / "results.json", text + "\n")
            write_text(mine / "table.txt", self.table() + "\n")

    def _title(self) -> str:
        made = self.results["settings"]
        ranks = made["ranks"]
        said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        name = os.path.basename(self.results["model"].rstrip("/")) or self.results["model"]
        machine = self.results["machine"]
        return (
            f"{name[:40]}, {made['dtype']}, {made['tokens']} tokens a step ({made['data']})\n"
            f"{said} on {made['modules']} modules; {machine['device']}, "
            f"{machine['threads']} threads; medians of {made['repetitions']}"
        )

    def _rich(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
        table.add_column("variant", no_wrap=True)
        for column in ("ms/step\n(95%)", "tokens/s", "over\nfrozen", "overhead /\nPEFT's (95%)",
                       "peak\nMiB"):  # fmt: skip
            table.add_column(column, justify="right", no_wrap=True)
        for name, n in self.results["arms"].items():
            if "milliseconds" not in n:
                table.add_row(name, "not timed", "", "", "", "")
                continue
            ratio, peak = n.get("overhead_over_peft"), n.get("peak_bytes")
            table.add_row(
                name,
                _with_interval(n["milliseconds"], 3),
                f"{n['tokens_per_second']:,.0f}",
                f"{n['overhead']['value']:+.1%}" if "overhead" in n else "",
                "" if ratio is None else _with_interval(ratio, 2),
                "" if peak is None else f"{peak / MIB:,.0f}",
            )
        return table

    def reading(self) -> list[str]:
        """What the numbers say, and what was left out."""
        arms, lines = self.results["arms"], []
        ours = arms[OURS]
        for name, n in arms.items():
            if "why" in n:
                lines.append(f"{name}: {n['why']}.")
        if any("overhead" in arms.get(name, {}) for name in FLOORS):
            lines.append("Graphed steps: over the frozen base's, graphed too.")
        if "overhead" in ours and "overhead_over_peft" in ours:
            ratio = ours["overhead_over_peft"]
            if ratio is None:
                lines.append("PEFT's overhead is not above the noise here: no ratio to it.")
            elif ratio["high"] < 1:
                lines.append("The overhead of adapters is below PEFT's, by more than noise.")
            elif ratio["low"] > 1:
                lines.append("The overhead of adapters is above PEFT's here: keep PEFT's layers.")
            else:
                lines.append("No difference from PEFT's overhead beyond the noise.")
        if "difference_from_peft" in ours:
            text = f"Gradients: ours differ from PEFT's by {ours['difference_from_peft']:.1g}"
            if "error_in_float64" in ours:
                theirs = arms["PEFT"]["error_in_float64"]
                text += f"; from float64 by {ours['error_in_float64']:.1g}, PEFT's by {theirs:.1g}"
            lines.append(f"{text}.")
        lines += self.results["notes"]
        return lines


def _with_interval(found: Interval, digits: int) -> str:
    def say(value: float) -> str:
        if abs(value) >= 100:
            return f"{value:,.0f}"
        return f"{value:.2f}" if digits == 2 else f"{value:.{digits}g}"

    between = "-" if found["low"] >= 0 else " to "
    return f"{say(found['value'])} ({say(found['low'])}{between}{say(found['high'])})"
