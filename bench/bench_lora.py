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
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adarank_fast as ada
from bench.blocks import TARGETS, Block, adapted, cast_base
from bench.counts import SHAPES
from bench.results_file import write_all
from bench.slices import Row, Slices, arguments, kernel_sources, medians, ratio_interval

TOKENS = (4, 256)  # batch, sequence


KINDS = ("SmolLM2-135M", "MiniLM", "MPNet-base")


def variants(
    kind: str, targets: str, average_rank: int, dtype: torch.dtype
) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    block = Block(kind).requires_grad_(False)
    peft_default = cast_base(adapted(block, targets, average_rank, mixed=True), dtype)
    models: dict[str, nn.Module] = {
        "frozen": copy.deepcopy(block).to(dtype),
        "peft": adapted(block, targets, average_rank, mixed=True).to(dtype),
    }
    if dtype != torch.float32:
        models["peft default"] = peft_default
        models["ours, float32 adapters"] = ada.accelerate(copy.deepcopy(peft_default))
    models["ours"] = ada.accelerate(copy.deepcopy(models["peft"]))
    models["ours, uniform"] = ada.accelerate(
        adapted(block, targets, average_rank, mixed=False).to(dtype)
    )
    return models


def step_of(model: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> None:
        clear(leaves)
        model(x).backward(dy)

    return step


def clear(leaves: Iterable[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def check(models: dict[str, nn.Module], x: Tensor, dy: Tensor) -> None:
    """No time is reported for a step that computes something else."""
    found = {}
    for name in ("peft", "ours"):
        step_of(models[name], x, dy)()
        step_of(models[name], x, dy)()
        assert x.grad is not None
        found[name] = [x.grad.clone()] + [
            p.grad.clone() for p in models[name].parameters() if p.grad is not None
        ]
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found["ours"], found["peft"], strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert ada.fusion_report(models["ours"]).fused_share == 1.0


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


SKINNY = 66  # products with a dimension up to here are the adapters'; no base has one


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


ROWS: dict[str, tuple[str, str, int, torch.dtype]] = {
    f"{kind}, {targets}, rank {rank}, {str(dtype).removeprefix('torch.')}": (
        kind,
        targets,
        rank,
        dtype,
    )
    for dtype in (torch.float32, torch.bfloat16)
    for kind in KINDS
    for targets in TARGETS
    for rank in (4, 8, 16)
}


def steps_of_row(key: str) -> tuple[dict[str, Callable[[], None]], Row]:
    """The row's steps, checked, and what is not timed."""
    kind, targets, rank, dtype = ROWS[key]
    models = variants(kind, targets, rank, dtype)
    width = SHAPES[kind].width
    x = torch.randn(*TOKENS, width, dtype=dtype, requires_grad=True)
    dy = torch.randn(*TOKENS, width, dtype=dtype)
    check(models, x, dy)
    steps = {name: step_of(model, x, dy) for name, model in models.items()}
    once = {
        "arithmetic": arithmetic_overhead(models["ours"]),
        "peak_bytes": {name: peak_bytes(steps[name], model, x) for name, model in models.items()},
        "profile": {name: parts(steps[name]) for name in ("frozen", "ours", "peft")},
    }
    return steps, once


def arithmetic_overhead(model: nn.Module) -> float:
    """LoRA's own FLOPs over the frozen step's: what the adapters would cost at the base's rate."""
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    linear = sum(
        p.numel() for n, p in model.named_parameters() if "lora_" not in n and p.dim() == 2
    )
    batch, length = TOKENS
    width = next(p.shape[0] for n, p in model.named_parameters() if n.endswith("norm1.weight"))
    attention = 2 * length * width  # scores and mixing, as weights per token; backward doubles it
    return 6 * lora / (4 * linear + 6 * attention)


def figures(key: str, row: Row) -> dict[str, Any]:
    """One row of the results: times are medians in seconds, overheads shares of the frozen step."""
    kind, targets, rank, dtype = ROWS[key]
    middle = medians(row["seconds"])
    base = middle["frozen"]
    ratio, low, high = ratio_interval([row], "ours", "peft", 200)
    profile = row["profile"]
    beyond = {
        name: (seconds - profile["frozen"][name]) / sum(profile["frozen"].values())
        for name, seconds in profile["ours"].items()
    }
    return {
        "model": kind,
        "targets": targets,
        "average_rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "repetitions": len(row["seconds"]["frozen"]),
        "median_seconds": middle,
        "overhead": {name: value / base - 1 for name, value in middle.items()},
        "ours_over_peft": {"ratio": ratio, "interval": [low, high]},
        "arithmetic": row["arithmetic"],
        "profiled_overhead": beyond,
        "peak_bytes": row["peak_bytes"],
    }


def summary(rows: dict[str, Row]) -> dict[str, Any]:
    """The ratios that the targets speak of."""
    found: dict[str, Any] = {}
    every = list(rows.values())
    low = [row for key, row in rows.items() if key.endswith("bfloat16")]
    high = [row for key, row in rows.items() if key.endswith("float32")]
    for name, some, ours, theirs in (
        ("matching dtypes, all rows", every, "ours", "peft"),
        ("matching dtypes, float32", high, "ours", "peft"),
        ("matching dtypes, bfloat16", low, "ours", "peft"),
        ("PEFT's default on bfloat16", low, "ours, float32 adapters", "peft default"),
        ("mixed over uniform ranks", every, "ours", "ours, uniform"),
    ):
        ratio, lower, upper = ratio_interval(some, ours, theirs)
        found[name] = {"ratio": ratio, "interval": [lower, upper]}
    middles = [medians(row["seconds"]) for row in every]
    steps = [middle["ours"] / middle["ours, uniform"] - 1 for middle in middles]
    found["mixed step over uniform step"] = {"median": statistics.median(steps), "max": max(steps)}
    found["rows slower than PEFT"] = [
        key for key, row in rows.items() if ratio_interval([row], "ours", "peft", 200)[1] > 1
    ]
    found["rows with a higher peak than PEFT"] = [
        f"{key}: {row['peak_bytes']['ours']} against {row['peak_bytes']['peft']} bytes"
        for key, row in rows.items()
        if row["peak_bytes"]["ours"] > row["peak_bytes"]["peft"]
    ]
    return found


def main() -> None:
    parser = arguments("Training steps of one transformer block.", repetitions=100)
    options = parser.parse_args()
    folder = Path(__file__).parent
    sources = [*kernel_sources(), *(folder / f"{name}.py" for name in ("bench_lora", "blocks"))]
    slices = Slices("lora", list(ROWS), options.repetitions, sources)
    left = any(slices.missing(key) > 0 for key in ROWS)
    done = 0
    while left and (not options.slices or done < options.slices):
        left, done = slices.run(steps_of_row, options.seconds), done + 1
    if left:
        rows = sum(slices.missing(key) <= 0 for key in ROWS)
        print(f"{rows} of {len(ROWS)} rows finished; run again to go on")
        return
    rows = {key: slices.rows[key] for key in ROWS}
    found = summary(rows)
    path = write_all(
        "lora", {**{key: figures(key, row) for key, row in rows.items()}, "summary": found}
    )
    for name, value in found.items():
        print(f"{name}: {value}")
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
