"""Training steps of one transformer block: the frozen base, PEFT, and adarank-fast, interleaved.

    python -m pytest bench/bench_lora.py            (or `make bench-lora`)

Overhead is a step's time minus that of the frozen base whose input requires a gradient. A row is a
block of a real model's shape, a choice of targets, an average rank and a dtype; ranks are mixed.
Every repetition times every variant once, in an order drawn anew. Results go to
bench/results/lora.json; the summary is the sum of our overheads over the sum of PEFT's, with a
bootstrap interval over repetitions.
"""

from __future__ import annotations

import copy
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import adarank_fast as ada
from bench.results_file import write_results

REPETITIONS = int(os.environ.get("BENCH_REPETITIONS", "100"))
TOKENS = (4, 256)  # batch, sequence


class Block(nn.Module):
    """Attention and feed-forward of one layer in the shapes of a real model, weights random."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        width, kv, inner, gated = SHAPES[kind]
        self.heads, self.kv_heads = width // HEAD_SIZE[kind], kv // HEAD_SIZE[kind]
        bias = not gated
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, kv, bias=bias)
        self.v = nn.Linear(width, kv, bias=bias)
        self.o = nn.Linear(width, width, bias=bias)
        self.gate = nn.Linear(width, inner, bias=bias) if gated else None
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q = self.q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k(h).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v(h).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, enable_gqa=self.heads != self.kv_heads
        )
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        inner = nn.functional.silu(self.gate(h)) * self.up(h) if self.gate is not None else None
        return x + self.down(nn.functional.gelu(self.up(h)) if inner is None else inner)


SHAPES = {  # width, key / value width, inner width, gated
    "SmolLM2-135M": (576, 192, 1536, True),
    "MiniLM": (384, 384, 1536, False),
    "MPNet-base": (768, 768, 3072, False),
}
HEAD_SIZE = {"SmolLM2-135M": 64, "MiniLM": 32, "MPNet-base": 64}
TARGETS = {
    "attention": ["q", "k", "v", "o"],
    "all-linear": ["q", "k", "v", "o", "gate", "up", "down"],
}
# shares of the average rank, as AdaRank gives them on real models: values and outputs first
SHARES = {"q": 0.5, "k": 0.5, "v": 1.75, "o": 1.25, "gate": 0.75, "up": 1.0, "down": 1.5}


def adapted(block: Block, targets: str, average_rank: int, mixed: bool) -> nn.Module:
    """A PEFT model of the block: the same adapter parameters whether mixed or uniform."""
    names = [name for name in TARGETS[targets] if getattr(block, name) is not None]
    uniform = ada.RankPlan.uniform(block, average_rank, target_modules=names)
    plan = uniform
    if mixed:
        ranks = ada.allocate_ranks(
            {name: SHARES[name] for name in uniform.ranks},
            budget_parameters=uniform.parameters,
            sizes=uniform.sizes,
        )
        plan = ada.RankPlan(ranks, uniform.sizes)
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(block), plan.to_lora_config())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def variants(
    kind: str, targets: str, average_rank: int, dtype: torch.dtype
) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    block = Block(kind).requires_grad_(False)
    peft_default = adapted(block, targets, average_rank, mixed=True)
    for name, parameter in peft_default.named_parameters():  # float32 adapters, as PEFT keeps them
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
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
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        model(x).backward(dy)

    return step


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


def peak_bytes(step: Callable[[], None]) -> int:
    """Largest sum of live tensors that a step allocates, by the profiler's memory events."""
    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def interleaved(steps: dict[str, Callable[[], None]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every repetition of every variant; all are timed once before any is again."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    for step in [*steps.values()] * 3:
        step()
    for _ in range(repetitions):
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio_interval(
    rows: list[dict[str, Any]], ours: str, theirs: str, draws: int = 1000
) -> tuple[float, float, float]:
    """Sum over rows of our median overhead / PEFT's, with a 95% bootstrap interval."""
    random_state = random.Random(0)

    def ratio(pick: Callable[[int], list[int]]) -> float:
        sums = {ours: 0.0, theirs: 0.0}
        for row in rows:
            chosen = pick(len(row["seconds"]["frozen"]))
            medians = {
                name: statistics.median(row["seconds"][name][i] for i in chosen)
                for name in ("frozen", ours, theirs)
            }
            for name in sums:
                sums[name] += medians[name] - medians["frozen"]
        return sums[ours] / sums[theirs]

    drawn = sorted(ratio(lambda n: random_state.choices(range(n), k=n)) for _ in range(draws))
    return ratio(lambda n: list(range(n))), drawn[draws // 40], drawn[-draws // 40]


ROWS = [
    (kind, targets, rank, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for kind in SHAPES
    for targets in TARGETS
    for rank in (4, 8, 16)
]
DONE: list[dict[str, Any]] = []


@pytest.mark.parametrize(("kind", "targets", "rank", "dtype"), ROWS)
def test_step(benchmark, capsys, kind, targets, rank, dtype):
    models = variants(kind, targets, rank, dtype)
    width = SHAPES[kind][0]
    x = torch.randn(*TOKENS, width, dtype=dtype, requires_grad=True)
    dy = torch.randn(*TOKENS, width, dtype=dtype)
    check(models, x, dy)
    steps = {name: step_of(model, x, dy) for name, model in models.items()}
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    seconds = interleaved(steps, REPETITIONS)
    benchmark.pedantic(steps["ours"], rounds=5)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = medians["frozen"]
    row = {
        "model": kind,
        "targets": targets,
        "average_rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "repetitions": REPETITIONS,
        "median_seconds": medians,
        "overhead": {name: value / base - 1 for name, value in medians.items()},
        "arithmetic": arithmetic_overhead(models["ours"]),
        "peak_bytes": peaks,
    }
    benchmark.extra_info.update(row["overhead"])
    DONE.append({**row, "seconds": seconds})
    write_results("lora", f"{kind}, {targets}, rank {rank}, {row['dtype']}", row)
    overheads = ", ".join(f"{n} {v:.3f}" for n, v in row["overhead"].items() if n != "frozen")
    with capsys.disabled():
        print(
            f"\n{kind}, {targets}, rank {rank}, {row['dtype']}: base {base * 1e3:.2f} ms; overhead "
            f"{overheads}; arithmetic {row['arithmetic']:.3f}"
        )


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


def test_summary(capsys):
    """The ratios that the targets speak of; needs the rows above in the same run."""
    if len(DONE) < len(ROWS):
        pytest.skip("needs every row of this run")
    summary = {}
    low = [row for row in DONE if row["dtype"] == "bfloat16"]
    for name, rows, ours, theirs in (
        ("matching dtypes, all rows", DONE, "ours", "peft"),
        ("matching dtypes, float32", [r for r in DONE if r not in low], "ours", "peft"),
        ("matching dtypes, bfloat16", low, "ours", "peft"),
        ("PEFT's default on bfloat16", low, "ours, float32 adapters", "peft default"),
        ("mixed over uniform ranks", DONE, "ours", "ours, uniform"),
    ):
        middle, lower, upper = ratio_interval(rows, ours, theirs)
        summary[name] = {"ratio": middle, "interval": [lower, upper]}
    steps = [r["median_seconds"]["ours"] / r["median_seconds"]["ours, uniform"] - 1 for r in DONE]
    summary["mixed step over uniform step"] = {
        "median": statistics.median(steps),
        "max": max(steps),
    }
    summary["rows slower than PEFT"] = [
        f"{r['model']}, {r['targets']}, rank {r['average_rank']}, {r['dtype']}"
        for r in DONE
        if ratio_interval([r], "ours", "peft", 200)[1] > 1
    ]
    summary["rows with a higher peak than PEFT"] = sum(
        r["peak_bytes"]["ours"] > r["peak_bytes"]["peft"] for r in DONE
    )
    write_results("lora", "summary", summary)
    with capsys.disabled():
        print()
        for name, figures in summary.items():
            print(f"{name}: {figures}")
