"""Training steps of one transformer block: the frozen base, PEFT, and adarank-fast, interleaved.

    python -m bench.bench_lora                 (or `make bench-lora`): all rows
    python -m bench.bench_lora --slices 1      goes on where it stopped, for about a minute

Overhead is a step's time minus that of the frozen base whose input requires a gradient. A row is a
block of a real model's shape, a choice of targets, an average rank and a dtype; ranks are mixed.
Every repetition times every variant once, in an order drawn anew. When the last row is finished,
all go to bench/results/lora.json, with the sum of our overheads over the sum of PEFT's and a
bootstrap interval over repetitions.
"""

from __future__ import annotations

import gc
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from adarank_fast.benchmarking.measure import Step, medians, overhead_ratio
from bench.blocks import ADAPTERS32, DTYPES, TARGETS, Block, block_variants, check, step_of
from bench.counts import SHAPES
from bench.slices import Row, Slices, arguments

TOKENS = (4, 256)  # batch, sequence
OURS = ("torch::autograd::CppNode", "adarank::")  # events of the profile
ROWS = {
    f"{kind}, {targets}, rank {rank}, {dtype}": (kind, targets, rank, DTYPES[dtype])
    for dtype in DTYPES
    for kind in ("SmolLM2-135M", "MiniLM", "MPNet-base")
    for targets in TARGETS
    for rank in (4, 8, 16)
}


def steps_of_row(key: str) -> tuple[dict[str, Step], Row]:
    """The row's steps, checked, and what is not timed."""
    kind, targets, rank, dtype = ROWS[key]
    torch.manual_seed(0)
    block = Block(kind).requires_grad_(False)
    models = block_variants(block, targets, rank, dtype)
    x = torch.randn(*TOKENS, SHAPES[kind].width, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    check(models, lambda model: step_of(model, x, dy)(), tolerance)
    steps = {name: step_of(model, x, dy) for name, model in models.items()}
    once = {
        "arithmetic": arithmetic_overhead(models["ours"]),
        "peak_bytes": {name: peak_bytes(steps[name], model, x) for name, model in models.items()},
        "node_seconds": {name: node_seconds(steps[name]) for name in ("frozen", "ours")},
    }
    return steps, once


def peak_bytes(step: Step, model: nn.Module, x: Tensor) -> int:
    """Largest sum of live tensors that a step allocates, by the profiler's memory events."""
    step()
    for leaf in (x, *model.parameters()):  # or they are freed in the step, or before it is watched
        leaf.grad = None
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def node_seconds(step: Step, steps: int = 5) -> tuple[float, float]:
    """Of a profiled step: seconds in the group's node and this package's operators, and of all."""
    step()
    with torch.profiler.profile() as profile:
        for _ in range(steps):
            step()
    events = [(event.key, event.self_cpu_time_total) for event in profile.key_averages()]
    ours = sum(time for key, time in events if key.startswith(OURS))
    return ours * 1e-6 / steps, sum(time for _, time in events) * 1e-6 / steps


def arithmetic_overhead(model: nn.Module) -> float:
    """LoRA's own FLOPs over the frozen step's: what the adapters would cost at the base's rate."""
    parameters = dict(model.named_parameters())
    lora = sum(p.numel() for n, p in parameters.items() if "lora_" in n)
    linear = sum(p.numel() for n, p in parameters.items() if "lora_" not in n and p.dim() == 2)
    width = next(p.shape[0] for n, p in parameters.items() if n.endswith("norm1.weight"))
    attention = 2 * TOKENS[1] * width  # scores and mixing, as weights per token; backward doubles
    return 6 * lora / (4 * linear + 6 * attention)


def figures(row: Row) -> dict[str, Any]:
    """One row of the results: times are medians in seconds, overheads shares of the frozen step."""
    middle, ours = medians(row["seconds"]), row["node_seconds"]
    return {
        "repetitions": len(row["seconds"]["frozen"]),
        "median_seconds": middle,
        "overhead": {name: value / middle["frozen"] - 1 for name, value in middle.items()},
        "ours_over_peft": overhead_ratio([row], "ours", "peft", 200),
        "arithmetic": row["arithmetic"],
        "profiled_overhead": {"python": ours["ours"][0] / ours["frozen"][1]},
        "peak_bytes": row["peak_bytes"],
    }


def results(rows: dict[str, Row]) -> dict[str, Row]:
    """Every row, and as "summary" the ratios that the targets speak of."""
    every, told = list(rows.values()), {key: figures(row) for key, row in rows.items()}
    low, high = ([row for k, row in rows.items() if k.endswith(d)] for d in ("bfloat16", "float32"))
    sums = {
        "matching dtypes, all rows": (every, "ours", "peft"),
        "matching dtypes, float32": (high, "ours", "peft"),
        "matching dtypes, bfloat16": (low, "ours", "peft"),
        "PEFT's default on bfloat16": (low, ADAPTERS32, "peft default"),
        "mixed over uniform ranks": (every, "ours", "ours, uniform"),
    }
    middles = [row["median_seconds"] for row in told.values()]
    steps = [middle["ours"] / middle["ours, uniform"] - 1 for middle in middles]
    peaks = {key: row["peak_bytes"] for key, row in told.items()}
    summary: Row = {key: overhead_ratio(*some) for key, some in sums.items() if some[0]}
    summary["mixed step over uniform step"] = {"median": median(steps), "max": max(steps)}
    summary["rows slower than PEFT"] = [
        key for key, row in told.items() if row["ours_over_peft"]["interval"][0] > 1
    ]
    summary["rows with a higher peak than PEFT"] = [
        f"{key}: {peak['ours']} against {peak['peft']} bytes"
        for key, peak in peaks.items()
        if peak["ours"] > peak["peft"]
    ]
    return told | {"summary": summary}


if __name__ == "__main__":
    options = arguments("Training steps of one transformer block.", repetitions=40).parse_args()
    Slices("lora", __file__, options).finish(ROWS, steps_of_row, results)
