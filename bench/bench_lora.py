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

import copy
import gc
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import adarank_fast as ada
from bench.blocks import ADAPTERS32, DTYPES, TARGETS, Block, adapted, cast_base, check, variants
from bench.counts import SHAPES
from bench.results_file import write_results
from bench.slices import Row, Slices, Step, arguments, medians, overhead_ratio

TOKENS = (4, 256)  # batch, sequence
SKINNY = 66  # products with a dimension up to here are the adapters'; no base has one
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

    def make(adapters: torch.dtype, mixed: bool) -> nn.Module:
        model = adapted(block, targets, rank, mixed)
        return model.to(dtype) if adapters == dtype else cast_base(model, dtype)

    def fused(model: nn.Module) -> nn.Module:
        return ada.accelerate(copy.deepcopy(model))

    models = variants(copy.deepcopy(block).to(dtype), make, fused, dtype)
    x = torch.randn(*TOKENS, SHAPES[kind].width, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def gradients(model: nn.Module) -> list[Tensor]:
        step_of(model, x, dy)()
        leaves = (x, *model.parameters())
        return [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]

    check(models, gradients, tolerance=1e-5 if dtype == torch.float32 else 2e-2)
    steps = {name: step_of(model, x, dy) for name, model in models.items()}
    once = {
        "arithmetic": arithmetic_overhead(models["ours"]),
        "peak_bytes": {name: peak_bytes(steps[name], model, x) for name, model in models.items()},
        "profile": {name: parts(steps[name]) for name in ("frozen", "ours", "peft")},
    }
    return steps, once


def step_of(model: nn.Module, x: Tensor, dy: Tensor) -> Step:
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> None:
        clear(leaves)
        model(x).backward(dy)

    return step


def clear(leaves: Iterable[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def peak_bytes(step: Callable[[], None], model: nn.Module, x: Tensor) -> int:
    """Largest sum of live tensors that a step allocates, by the profiler's memory events."""
    step()
    clear([x, *model.parameters()])  # or they are freed in the step, sometimes before it is watched
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def parts(step: Callable[[], None], steps: int = 5) -> dict[str, float]:
    """Seconds of a profiled step: wide and skinny products, other operations, the node's Python."""
    step()
    with torch.profiler.profile(record_shapes=True) as profile:
        for _ in range(steps):
            step()
    sums = {"wide products": 0.0, "skinny products": 0.0, "python": 0.0, "other operations": 0.0}
    for event in profile.key_averages(group_by_input_shape=True):
        kind = "other operations"
        if event.key in ("aten::mm", "aten::addmm", "aten::addmm_"):
            sizes = [size for shape in event.input_shapes for size in shape if len(shape) == 2]
            kind = "skinny products" if min(sizes) <= SKINNY else "wide products"
        elif event.key.startswith("GroupedLoraLinear"):
            kind = "python"
        sums[kind] += event.self_cpu_time_total * 1e-6 / steps
    return sums


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
    middle, profile = medians(row["seconds"]), row["profile"]
    frozen = sum(profile["frozen"].values())
    beyond = {k: (v - profile["frozen"][k]) / frozen for k, v in profile["ours"].items()}
    return {
        "repetitions": len(row["seconds"]["frozen"]),
        "median_seconds": middle,
        "overhead": {name: value / middle["frozen"] - 1 for name, value in middle.items()},
        "ours_over_peft": overhead_ratio([row], "ours", "peft", 200),
        "arithmetic": row["arithmetic"],
        "profiled_overhead": beyond,
        "peak_bytes": row["peak_bytes"],
    }


def summary(rows: dict[str, Row]) -> dict[str, Any]:
    """The ratios that the targets speak of."""
    every = list(rows.values())
    low, high = ([row for k, row in rows.items() if k.endswith(d)] for d in ("bfloat16", "float32"))
    middles = [medians(row["seconds"]) for row in every]
    steps = [middle["ours"] / middle["ours, uniform"] - 1 for middle in middles]
    ratios = {key: overhead_ratio([row], "ours", "peft", 200) for key, row in rows.items()}
    peaks = {key: row["peak_bytes"] for key, row in rows.items()}
    return {
        "matching dtypes, all rows": overhead_ratio(every, "ours", "peft"),
        "matching dtypes, float32": overhead_ratio(high, "ours", "peft"),
        "matching dtypes, bfloat16": overhead_ratio(low, "ours", "peft"),
        "PEFT's default on bfloat16": overhead_ratio(low, ADAPTERS32, "peft default"),
        "mixed over uniform ranks": overhead_ratio(every, "ours", "ours, uniform"),
        "mixed step over uniform step": {"median": statistics.median(steps), "max": max(steps)},
        "rows slower than PEFT": [k for k, found in ratios.items() if found["interval"][0] > 1],
        "rows with a higher peak than PEFT": [
            f"{key}: {peak['ours']} against {peak['peft']} bytes"
            for key, peak in peaks.items()
            if peak["ours"] > peak["peft"]
        ],
    }


def main() -> None:
    options = arguments("Training steps of one transformer block.", repetitions=100).parse_args()
    keys = [key for key in ROWS if options.only in key]
    if rows := Slices("lora", keys, options, __file__).finish(steps_of_row):
        found = summary(rows)
        for name, value in found.items():
            print(f"{name}: {value}")
        told = {key: figures(row) for key, row in rows.items()}
        if not options.only:
            write_results("lora", told | {"summary": found}, keep=False)


if __name__ == "__main__":
    main()
