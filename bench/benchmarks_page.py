"""Writes docs/benchmarks.md from the results under bench/results/.

    python -m bench.benchmarks_page            (or `make benchmarks-page`)

The page says nothing that the files do not: a row that is not in its file is absent, a benchmark
without a file is "not run yet". A test compares the committed page with the committed files.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adarank_fast.files import replacing
from bench.results_file import FOLDER

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
NONE = "-"
VARIANTS = ("peft", "ours", "ours, uniform", "peft default", "ours, float32 adapters")

TEXT = """# Benchmarks

Written by `make benchmarks-page` from the files in `bench/results`; do not edit. Seconds are
medians; *to* between two numbers is a 95% bootstrap interval, or the range of the rounds where it
says so. A figure with a target is followed by whether the target was reached; the figure itself
decides, and where the target lies within the interval, that is said. `make bench` runs everything.
"""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A limit that a figure is held against."""

    limit: float
    least: bool = False  # at least the limit; else at most

    def said(self, value: float, interval: Sequence[float] | None = None) -> str:
        good = value >= self.limit if self.least else value <= self.limit
        verdict = "reached" if good else "**missed**"
        if interval and interval[0] <= self.limit <= interval[1]:
            verdict += ", target within the interval"
        return verdict


OVER_FLOOR, NOISE, PEAK = Target(1.15), Target(0.05), Target(1.5)
NAIVE, ADAPTIVE = Target(2.5, least=True), Target(1.5, least=True)  # about 3: what rounds to it
EXTRA_MEMORY, NO_SLOWER = Target(0.05), Target(1.0, least=True)
ADDED, MINUTES = Target(0.05), Target(20.0)
MATCHING, DEFAULT, MIXED = Target(0.5), Target(0.25), Target(0.03)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def ratio(found: Row | None) -> str:
    """0.66 (0.60 to 0.72)"""
    if found is None:
        return NONE
    low, high = found["interval"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def share(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"


def prediction(rows: Mapping[str, Row]) -> str:
    adaptive = {name: row for name, row in rows.items() if "saved_ratio" in row}
    timed = {name: row for name, row in rows.items() if name not in adaptive}
    parts = []
    if timed:
        header = (
            "row",
            "prediction, s",
            "floor, s",
            "GEMM alone, s",
            "over the floor (at most 1.15)",
            "naive loop over ours (float32: about 3)",
            "noise (at most 5%)",
            "peak memory over one forward's (at most 1.5)",
            "command",
        )
        parts.append(table(header, [_timed_prediction(*pair) for pair in timed.items()]))
    if adaptive:
        header = (
            "row",
            "trials",
            "trials if all modules had as many as the most",
            "trials of a module",
            "saved (at least 1.5)",
            "command",
        )
        parts.append(table(header, [_adaptive_prediction(*pair) for pair in adaptive.items()]))
    return "\n\n".join(parts)


def _timed_prediction(name: str, row: Row) -> Sequence[str]:
    rounds = [a / b for a, b in zip(row["seconds"], row["floor_seconds"], strict=True)]
    spread = ", one round"
    if len(rounds) > 1:
        spread = f" ({min(rounds):.2f} to {max(rounds):.2f} over {len(rounds)} rounds)"
    over, naive = row["over_floor"], row["naive_over_ours"]
    noise, peak = row["noise_share"], row["peak_over_ordinary_forward"]
    return (
        name,
        f"{statistics.median(row['seconds']):.1f}",
        f"{statistics.median(row['floor_seconds']):.1f}",
        f"{row['gemm_floor']:.1f}",
        f"{over:.2f}{spread}: {OVER_FLOOR.said(over)}",
        f"{naive:.2f}" + (f": {NAIVE.said(naive)}" if name.endswith("float32") else ""),
        f"{noise:.1%}: {NOISE.said(noise)}",
        f"{peak:.2f}: {PEAK.said(peak)}",
        _pytest("prediction", "smollm2" if name.startswith("smollm2") else name),
    )


def _adaptive_prediction(name: str, row: Row) -> Sequence[str]:
    saved = row["saved_ratio"]
    return (
        name,
        f"{row['trials']:,}",
        f"{row['trials_if_all_had_as_many']:,}",
        f"{row['fewest']} to {row['most']}",
        f"{saved:.2f}: {ADAPTIVE.said(saved)}",
        _pytest("prediction", "adaptive"),
    )


def _pytest(name: str, which: str) -> str:
    return f"`python -m pytest bench/bench_{name}.py -s -k {which}`"


def disagreement(rows: Mapping[str, Row]) -> str:
    lines = []
    for name, row in rows.items():
        metric, dtype = name.split()
        ours, theirs = row["adarank_fast_seconds"], row["materialised_seconds"]
        faster, extra = row["materialised_over_adarank_fast"], row["peak_share_of_outputs"]
        lines.append(
            (
                name,
                f"{statistics.median(ours):.1f} ({min(ours):.1f} to {max(ours):.1f})",
                f"{statistics.median(theirs):.1f} ({min(theirs):.1f} to {max(theirs):.1f})",
                f"{faster:.2f}: {NO_SLOWER.said(faster)}",
                f"{row['adarank_fast_peak_extra_bytes'] / 1e6:,.0f}",
                f"{row['materialised_peak_extra_bytes'] / 1e6:,.0f}",
                f"{extra:.1%}: {EXTRA_MEMORY.said(extra)}",
                _pytest("disagreement", f"{dtype}-{metric}"),
            )
        )
    header = (
        "row",
        "ours, s (all rounds)",
        "materialised, s (all rounds)",
        "materialised over ours (at least 1)",
        "ours, extra MB",
        "materialised, extra MB",
        "extra memory, share of [K, N, V] in float32 (at most 5%)",
        "command",
    )
    return table(header, lines)


def peak(row: Row) -> float:
    return row["peak_bytes"]["ours"] / row["peak_bytes"]["peft"]


def lora(rows: Mapping[str, Row]) -> str:
    blocks = {name: row for name, row in rows.items() if name != "summary"}
    summary = rows.get("summary", {})
    lines = []
    for name, title, target in (
        ("matching dtypes, all rows", "overhead over PEFT's, matching dtypes", MATCHING),
        ("matching dtypes, float32", "the same, float32", MATCHING),
        ("matching dtypes, bfloat16", "the same, bfloat16", MATCHING),
        ("PEFT's default on bfloat16", "overhead over PEFT's default on a bfloat16 base", DEFAULT),
        ("mixed over uniform ranks", "overhead of mixed over uniform ranks", None),
    ):
        if name in summary:
            found = summary[name]
            said = target.said(found["ratio"], found["interval"]) if target else NONE
            limit = f"at most {target.limit:g}" if target else NONE
            lines.append((title, ratio(found), limit, said))
    for key, title in (("median", "median over the rows"), ("max", "largest of a row")):
        if found := summary.get("mixed step over uniform step"):
            value = found[key]
            told = f"mixed step over the uniform one, {title}"
            lines.append((told, f"{value:+.1%}", f"at most +{MIXED.limit:.0%}", MIXED.said(value)))
    for key, title in (
        ("rows slower than PEFT", "rows slower than PEFT, whole interval above 1"),
        ("rows with a higher peak than PEFT", "rows with a higher peak of live tensors than PEFT"),
    ):
        if key in summary:
            found = summary[key]
            count = found if isinstance(found, int) else len(found)
            told = f"{count} of {len(blocks)}"
            if count and "peak" in key:
                told += f", by {max(map(peak, blocks.values())) - 1:.2%} at most"
            lines.append((title, told, NONE, NONE))
    parts = [table(("figure", "found", "target", ""), lines)] if lines else []
    middle = [
        (
            name,
            f"{1e3 * row['median_seconds']['frozen']:.1f}",
            *(share(row["overhead"].get(variant)) for variant in VARIANTS),
            ratio(row.get("ours_over_peft")),
            share(row.get("arithmetic")),
            share(row.get("profiled_overhead", {}).get("python")),
            f"{peak(row):.3f}",
            str(row["repetitions"]),
        )
        for name, row in blocks.items()
    ]
    header = (
        "row",
        "frozen step, ms",
        "overhead of PEFT",
        "of ours",
        "of ours, uniform ranks",
        "of PEFT's default",
        "of ours, float32 adapters",
        "ours / PEFT",
        "LoRA's FLOPs at the base's rate",
        "in our node, profiled",
        "peak / PEFT's",
        "repetitions",
    )
    return "\n\n".join([*parts, table(header, middle)])


def step(rows: Mapping[str, Row]) -> str:
    lines = [
        (
            name,
            f"{1e3 * row['median_seconds']['frozen']:.0f}",
            *(
                f"{row['over_frozen'][variant]:.3f}" if variant in row["over_frozen"] else NONE
                for variant in VARIANTS
            ),
            ratio(row.get("overhead_over_peft")),
            ratio(row.get("overhead_over_peft_default")),
            f"{row['mixed_step_over_uniform'] - 1:+.1%}",
            str(row["repetitions"]),
        )
        for name, row in rows.items()
    ]
    header = (
        "row",
        "frozen step, ms",
        "PEFT over frozen",
        "ours",
        "ours, uniform ranks",
        "PEFT's default",
        "ours, float32 adapters",
        "overhead, ours / PEFT",
        "overhead, ours / PEFT's default",
        "mixed over uniform",
        "repetitions",
    )
    return table(header, lines)


def comparison(rows: Mapping[str, Row]) -> str:
    lines = [
        (
            name,
            f"{row['seconds'] / 60:.1f}: {MINUTES.said(row['seconds'] / 60)}",
            f"{row['run_seconds'] / 60:.1f}",
            f"{row['training_seconds'] / 60:.1f}",
            f"{row['prediction_seconds']:.1f}",
            f"{row['added']:.1%}: {ADDED.said(row['added'])}",
            f"{row['added_to_steps']:.1%}",
        )
        for name, row in rows.items()
    ]
    header = (
        "row",
        "all, minutes (at most 20)",
        "runs, minutes",
        "training steps, minutes",
        "prediction, s",
        "added to the runs (at most 5%)",
        "added to training steps",
    )
    return table(header, lines)


@dataclass(frozen=True)
class Benchmark:
    """One section: a file of bench/results, what makes it, and how its rows are told."""

    title: str
    name: str
    command: str
    text: str
    told: Callable[[Mapping[str, Row]], str]


BENCHMARKS = (
    Benchmark(
        "Prediction",
        "prediction",
        "make bench-prediction",
        "`predict_ranks` against its floor, the measured time of the model's own forward over what "
        "no replay can avoid, and against the naive loop of full forwards, which is extrapolated "
        "from a sample of its probes; it compares in float32 and keeps what it needs of the clean "
        "run. Attention modules of MiniLM and MPNet-base on 64 TREC "
        "questions, five trials; all linears of SmolLM2-135M on 2,048 tokens, one trial. Noise: "
        "share of the prediction spent drawing it. About 3 is reached from 2.5 on.",
        prediction,
    ),
    Benchmark(
        "Disagreement",
        "disagreement",
        "make bench-disagreement",
        "`pairwise_disagreement` of 8 variants, 2,048 tokens and 49,152 outputs (SmolLM2-135M's "
        "head), against forming all outputs. Each measurement is a process of its own; extra "
        "memory is the peak of its resident memory less what the inputs take.",
        disagreement,
    ),
    Benchmark(
        "LoRA, one block",
        "lora",
        "make bench-lora",
        "Training steps of one transformer block, 1,024 tokens, interleaved with the frozen base "
        "and with PEFT. Overhead is the step less the frozen base's, in the first table the sum "
        "over rows of ours over the sum of the other's, in the second a share of the frozen step. "
        "PEFT's default keeps float32 adapters on a bfloat16 base. All rows are made by one "
        "command; `python -m bench.bench_lora --slices 1` measures the next one. LoRA's own FLOPs "
        "at the base's rate are what arithmetic alone would cost; *in our node* is what a profile "
        "puts into the autograd node itself: the compiled products with few ranks and its Python. "
        "The rest of the overhead is outside it: the base products beside other data in the "
        "caches, PEFT's modules, and gradients that are accumulated.",
        lora,
    ),
    Benchmark(
        "LoRA, whole models",
        "step",
        "make bench-step",
        "Training steps with loss and AdamW, 512 tokens, all linears adapted at average rank 8. "
        "The frozen base's goes back to its embeddings. There is no target for it. All rows are "
        "made by one command; `python -m bench.bench_step --slices 1` measures the next one.",
        step,
    ),
    Benchmark(
        "LoRA, whole model compiled",
        "step_compiled",
        "python -m bench.bench_step --compiled",
        "The same for MiniLM in float32 under `torch.compile`.",
        step,
    ),
    Benchmark(
        "Comparison",
        "compare",
        "make bench-compare",
        "The default `adarank compare` (2 arms, 3 seeds), report included. A run makes a model, "
        "trains and evaluates it; the rest is what comparing adds.",
        comparison,
    ),
)


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


def section(benchmark: Benchmark, folder: Path) -> str:
    path = folder / f"{benchmark.name}.json"
    if not path.exists():
        return _text(benchmark, f"Not run yet: `{benchmark.command}`.")
    rows = json.loads(path.read_text(encoding="utf-8"))
    text = _text(benchmark, f"`{benchmark.command}` writes `bench/results/{path.name}`.")
    return f"{text}\n\n{benchmark.told(rows)}\n\n{machines(rows)}"


def _text(benchmark: Benchmark, made: str) -> str:
    words = textwrap.fill(f"{benchmark.text} {made}", 100, break_on_hyphens=False)
    return f"## {benchmark.title}\n\n{words}"


def page(folder: Path = FOLDER) -> str:
    """The whole page, of the files in `folder`."""
    return "\n\n".join([TEXT.rstrip(), *(section(b, folder) for b in BENCHMARKS)]) + "\n"


def main() -> None:
    text = page()
    with replacing(PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
