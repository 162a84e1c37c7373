"""Writes docs/benchmarks.md from the results under bench/results/.

    python -m bench.benchmarks_page            (or `make benchmarks-page`)

Its words are in bench/texts. It says nothing that the files do not: a row that is not in its file
is absent, a benchmark without a file is "not run yet". A test compares page and files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench.pages import DOCS, NONE, machines, table, texts, wrapped, write_page
from bench.results_file import Row, read_results

PAGE = DOCS / "benchmarks.md"
Cell = Callable[[str, Row], str]  # of a row's name and figures


@dataclass(frozen=True)
class Target:
    """A limit that a figure is held against."""

    limit: float
    least: bool = False  # at least the limit; else at most

    def said(self, ratio: float, interval: Sequence[float] | None = None) -> str:
        good = ratio >= self.limit if self.least else ratio <= self.limit
        verdict = "reached" if good else "**missed**"
        if interval and interval[0] <= self.limit <= interval[1]:
            verdict += ", target within the interval"
        return verdict


def value(
    path: str, form: str, scale: float = 1.0, target: Target | None = None, less: float = 0.0
) -> Cell:
    """The figure at the end of `path`, times `scale`, less `less`; "-" where a row lacks it."""

    def cell(_: str, row: Row) -> str:
        found: Any = row
        for key in path.split("/"):
            if (found := found.get(key)) is None:
                return NONE
        number = found * scale - less
        return f"{number:{form}}" + (f": {target.said(number)}" if target else "")

    return cell


def with_interval(found: Row) -> str:
    """0.66 (0.60 to 0.72)"""
    low, high = found["interval"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def ratio(key: str, target: Callable[[str], Target | None] = lambda name: None) -> Cell:
    """0.28 (0.27 to 0.29): reached"""

    def cell(name: str, row: Row) -> str:
        if key not in row:
            return NONE
        limit, told = target(name), with_interval(row[key])
        return f"{told}: {limit.said(**row[key])}" if limit else told

    return cell


def overhead(arm: str) -> Cell:
    """Microseconds over the frozen layers."""

    def cell(_: str, row: Row) -> str:
        middle = row["median_seconds"]
        return f"{(middle[arm] - middle['frozen']) * 1e6:.0f}" if arm in middle else NONE

    return cell


def step_target(matching: bool) -> Callable[[str], Target | None]:
    """Of the rows of bench_step: of PEFT in the same dtypes, or of its default."""

    def target(name: str) -> Target | None:
        if not name.startswith("Llama"):
            return None
        if "tiny" in name or "generation" in name:
            return Target(0.6)
        return Target((0.38 if "float32" in name else 0.5) if matching else 0.18)

    return target


def rounds(key: str) -> Cell:
    """3.0 (2.0 to 4.0), of all rounds."""
    return lambda _, row: f"{median(row[key]):.1f} ({min(row[key]):.1f} to {max(row[key]):.1f})"


def over_floor(_: str, row: Row) -> str:
    found = [a / b for a, b in zip(row["seconds"], row["floor_seconds"], strict=True)]
    spread = ", one round"
    if len(found) > 1:
        spread = f" ({min(found):.2f} to {max(found):.2f} over {len(found)} rounds)"
    return f"{row['over_floor']:.2f}{spread}: {Target(1.15).said(row['over_floor'])}"


def over_naive(name: str, row: Row) -> str:
    target = Target(2.5, least=True) if name.endswith("float32") else None  # what rounds to 3
    return value("naive_over_ours", ".2f", target=target)(name, row)


def pytest(file: str, which: Callable[[str], str]) -> Cell:
    """The command that makes the row."""
    return lambda name, _: f"`python -m pytest bench/bench_{file}.py -s -k {which(name)}`"


REPETITIONS = value("repetitions", ".0f")
TIMED: Mapping[str, Cell] = {
    "prediction, s": lambda _, row: f"{median(row['seconds']):.1f}",
    "floor, s": lambda _, row: f"{median(row['floor_seconds']):.1f}",
    "GEMM alone, s": value("gemm_floor", ".1f"),
    "over the floor (at most 1.15)": over_floor,
    "naive loop over ours (float32: about 3)": over_naive,
    "noise (at most 5%)": value("noise_share", ".1%", target=Target(0.05)),
    "peak memory over one forward's (at most 1.5)": value(
        "peak_over_ordinary_forward", ".2f", target=Target(1.5)
    ),
    "command": pytest("prediction", lambda n: "smollm2" if n.startswith("smollm2") else n),
}
ADAPTIVE: Mapping[str, Cell] = {
    "trials": value("trials", ",.0f"),
    "trials if all modules had as many as the most": value("trials_if_all_had_as_many", ",.0f"),
    "trials of a module": lambda _, row: f"{row['fewest']} to {row['most']}",
    "saved (at least 1.5)": value("saved_ratio", ".2f", target=Target(1.5, least=True)),
    "command": pytest("prediction", lambda _: "adaptive"),
}
DISAGREEMENT: Mapping[str, Cell] = {
    "ours, s (all rounds)": rounds("adarank_fast_seconds"),
    "materialised, s (all rounds)": rounds("materialised_seconds"),
    "materialised over ours (at least 1)": value(
        "materialised_over_adarank_fast", ".2f", target=Target(1.0, least=True)
    ),
    "ours, extra MB": value("adarank_fast_peak_extra_bytes", ",.0f", 1e-6),
    "materialised, extra MB": value("materialised_peak_extra_bytes", ",.0f", 1e-6),
    "extra memory, share of [K, N, V] in float32 (at most 5%)": value(
        "peak_share_of_outputs", ".1%", target=Target(0.05)
    ),
    "command": pytest("disagreement", lambda name: "-".join(reversed(name.split()))),
}
VARIANTS = ("ours", "ours, uniform", "peft default", "ours, float32 adapters")
TITLES = ("ours", "ours, uniform ranks", "PEFT's default", "ours, float32 adapters")
BLOCK: Mapping[str, Cell] = {
    "frozen step, ms": value("median_seconds/frozen", ".1f", 1e3),
    "overhead of PEFT": value("overhead/peft", ".1%"),
    **{f"of {t}": value(f"overhead/{v}", ".1%") for t, v in zip(TITLES, VARIANTS, strict=True)},
    "ours / PEFT": ratio("ours_over_peft"),
    "LoRA's FLOPs at the base's rate": value("arithmetic", ".1%"),
    "in our node, profiled": value("profiled_overhead/python", ".1%"),
    "peak / PEFT's": lambda _, row: f"{peak(row):.3f}",
    "repetitions": REPETITIONS,
}
STEP: Mapping[str, Cell] = {
    "frozen step, ms": value("median_seconds/frozen", ".0f", 1e3),
    "PEFT over frozen": value("over_frozen/peft", ".3f"),
    **{t: value(f"over_frozen/{v}", ".3f") for t, v in zip(TITLES, VARIANTS, strict=True)},
    "overhead, ours / PEFT": ratio("overhead_over_peft", step_target(True)),
    "overhead, ours / PEFT's default": ratio("overhead_over_peft_default", step_target(False)),
    "mixed over uniform": value("mixed_step_over_uniform", "+.1%", less=1.0),
    "repetitions": REPETITIONS,
}
HOST: Mapping[str, Cell] = {
    "frozen, us": value("median_seconds/frozen", ".0f", 1e6),
    "PEFT over it, us": overhead("peft"),
    "ours, C++": overhead("ours"),
    "ours, Python": overhead("python"),
    "launches": lambda _, row: " / ".join(str(n) for n in list(row["launches"].values())[2:]),
    "C++ / PEFT (at most 0.3; 4 bit 0.6)": ratio(
        "ours_over_peft", lambda name: Target(0.6 if "4 bit" in name else 0.3)
    ),
    "Python / PEFT (at most 0.6)": ratio("python_over_peft", lambda _: Target(0.6)),
    "repetitions": REPETITIONS,
}
PREDICTION_HOST: Mapping[str, Cell] = {
    "probes": value("now/probes", ".0f"),
    "before, ms a probe": value("before/median_seconds", ".2f", 1e3),
    "now": value("now/median_seconds", ".2f", 1e3),
    "forwards before": value("before/forwards", ".0f"),
    "forwards now": value("now/forwards", ".0f"),
    "now / before (at most 0.5)": value("now_over_before", ".2f", target=Target(0.5)),
}
COMPARISON: Mapping[str, Cell] = {
    "all, minutes (at most 20)": value("seconds", ".1f", 1 / 60, Target(20.0)),
    "runs, minutes": value("run_seconds", ".1f", 1 / 60),
    "training steps, minutes": value("training_seconds", ".1f", 1 / 60),
    "prediction, s": value("prediction_seconds", ".1f"),
    "added to the runs (at most 5%)": value("added", ".1%", target=Target(0.05)),
    "added to training steps": value("added_to_steps", ".1%"),
}


def one_table(columns: Mapping[str, Cell], rows: Mapping[str, Row]) -> str:
    lines = [[name, *(cell(name, row) for cell in columns.values())] for name, row in rows.items()]
    return table(("row", *columns), lines)


def prediction(rows: Mapping[str, Row]) -> str:
    adaptive = {name: row for name, row in rows.items() if "saved_ratio" in row}
    timed = {name: row for name, row in rows.items() if name not in adaptive}
    parts = ((TIMED, timed), (ADAPTIVE, adaptive))
    return "\n\n".join(one_table(columns, some) for columns, some in parts if some)


def peak(row: Row) -> float:
    return row["peak_bytes"]["ours"] / row["peak_bytes"]["peft"]


SUMMED = (  # ratios over all rows: in the file, on the page, target
    ("matching dtypes, all rows", "overhead over PEFT's, matching dtypes", Target(0.5)),
    ("matching dtypes, float32", "the same, float32", Target(0.5)),
    ("matching dtypes, bfloat16", "the same, bfloat16", Target(0.5)),
    ("PEFT's default on bfloat16", "overhead over PEFT's default on a bfloat16 base", Target(0.25)),
    ("mixed over uniform ranks", "overhead of mixed over uniform ranks", None),
)
COUNTED = (
    ("rows slower than PEFT", "rows slower than PEFT, whole interval above 1"),
    ("rows with a higher peak than PEFT", "rows with a higher peak of live tensors than PEFT"),
)


def lora(rows: Mapping[str, Row]) -> str:
    blocks = {name: row for name, row in rows.items() if name != "summary"}
    summary = rows.get("summary", {})
    lines = []
    for key, title, target in SUMMED:
        if found := summary.get(key):
            limit = (f"at most {target.limit:g}", target.said(**found)) if target else (NONE, NONE)
            lines.append((title, with_interval(found), *limit))
    for key, title in (("median", "median over the rows"), ("max", "largest of a row")):
        if found := summary.get("mixed step over uniform step"):
            said = (f"{found[key]:+.1%}", "at most +3%", Target(0.03).said(found[key]))
            lines.append((f"mixed step over the uniform one, {title}", *said))
    for key, title in COUNTED:
        if key in summary:
            told = f"{len(summary[key])} of {len(blocks)}"
            if summary[key] and "peak" in key:
                told += f", by {max(map(peak, blocks.values())) - 1:.2%} at most"
            lines.append((title, told, NONE, NONE))
    first = [table(("figure", "found", "target", ""), lines)] if lines else []
    return "\n\n".join([*first, one_table(BLOCK, blocks)])


BENCHMARKS: Mapping[str, tuple[str, str, Callable[[Mapping[str, Row]], str]]] = {
    # title in the page's text: file of bench/results, what makes it, how its rows are told
    "Prediction": ("prediction", "make bench-prediction", prediction),
    "Prediction, host time": (
        *("prediction_host", "make bench-prediction-host"),
        partial(one_table, PREDICTION_HOST),
    ),
    "Disagreement": ("disagreement", "make bench-disagreement", partial(one_table, DISAGREEMENT)),
    "LoRA, one block": ("lora", "make bench-lora", lora),
    "LoRA, whole models": ("step", "make bench-step", partial(one_table, STEP)),
    "LoRA, whole model compiled": (
        *("step_compiled", "python -m bench.bench_step --compiled"),
        partial(one_table, STEP),
    ),
    "LoRA, host time": ("host", "make bench-host", partial(one_table, HOST)),
    "Comparison": ("compare", "make bench-compare", partial(one_table, COMPARISON)),
}


def section(title: str, text: str, folder: Path | None) -> str:
    name, command, told = BENCHMARKS[title]
    if rows := read_results(name, folder):
        text = wrapped(f"{text} `{command}` writes `bench/results/{name}.json`.")
        return f"## {title}\n\n{text}\n\n{told(rows)}\n\n{machines(rows)}"
    return f"## {title}\n\n{wrapped(f'{text} Not run yet: `{command}`.')}"


def page(folder: Path | None = None) -> str:
    """The whole page, of the files in `folder`, or of those of the repository."""
    lead, sections = texts(PAGE.name)
    return "\n\n".join([lead, *(section(*one, folder) for one in sections.items())]) + "\n"


if __name__ == "__main__":
    write_page(PAGE, page())
