"""What every row of the GPU benchmark needs: the card, the timers, what passed its checks."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.counts import Cost, product
from bench.gpu.checks import DTYPES, OWN, Check, usable_sets
from bench.gpu.timing import Step, Timer, peak_bytes, reason, release, rotating, timed

Row = dict[str, Any]


@dataclass
class Context:
    """A device, how to time on it, and what was found out about it so far."""

    device: torch.device
    timers: Callable[[], Sequence[Timer]]  # made anew for each row: graphs hold memory
    dtype_name: str = "bfloat16"
    repetitions: int = 50
    tokens: tuple[int, int] = (4, 1024)
    checks: list[Check] = field(default_factory=list)
    bandwidth: float | None = None  # measured: bytes a second of a large copy
    rate: float | None = None  # measured: FLOPs a second of a large product
    until: float = math.inf  # `time.perf_counter`: no other job begins after it
    limit: float = math.inf  # seconds that the repetitions of one timer may take

    @property
    def left(self) -> float:
        """Seconds until no other job begins."""
        return self.until - time.perf_counter()

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def sets(self, sets: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """Of these sets of kernels, those that passed and run in the dtype that is timed."""
        usable = usable_sets(sets, self.checks)
        if self.dtype == torch.float32:  # the kernels of products keep out of float32
            usable = {k: v for k, v in usable.items() if not any("lora" in name for name in v)}
        return usable

    def failure(self, op: str, kernels: str | None = None) -> str | None:
        """Why an op with a set of kernels, or a kernel by its own name, must not be timed."""
        for check in self.checks:
            same = check["op"] == op and kernels in (None, check["kernels"])
            if same and check["dtype"] in (self.dtype_name, OWN):
                if check["status"] != "passed":
                    return f"check failed ({check['case']})"
        return None

    def measure(
        self,
        row: str,
        steps: dict[str, Step],
        memory: bool = False,
        refused: Mapping[str, str | None] = {},
    ) -> list[Row]:
        """Medians of each step by each timer, one row a step; what fails or is refused says why."""
        steps = {name: step for name, step in steps.items() if not refused.get(name)}
        rows: dict[str, Row] = {
            name: {"row": row, "variant": name, "status": "ok"} for name in steps
        }
        for name, step in steps.items() if memory else ():
            try:
                rows[name]["peak_extra_bytes"] = peak_bytes(step, self.device)
            except Exception as error:  # the others are still worth timing
                rows[name]["status"] = reason(error)
                release()
        for timer in self.timers():
            alive = {name: step for name, step in steps.items() if rows[name]["status"] == "ok"}
            if timer.name == "graph":
                alive = {name: step for name, step in alive.items() if step.captured}
            seconds, failed = timed(alive, self.repetitions, timer, self.limit)
            for name, values in seconds.items():
                rows[name] |= summary(timer.name, values)
            for name, why in failed.items():
                rows[name]["graph" if timer.name == "graph" else "status"] = why
        whys = [(name, why) for name, why in refused.items() if why]
        return [*rows.values(), *({"row": row, "variant": n, "status": why} for n, why in whys)]

    def shares(self, row: Row, cost: Cost) -> Row:
        """The row with what it moves and computes, and its shares of the card's own rates."""
        row |= {"bytes": cost.bytes, "flops": cost.flops}
        seconds = row.get("graph_seconds", row.get("eager_seconds"))
        if seconds and self.bandwidth and self.rate:
            row["bandwidth_share"] = cost.bytes / seconds / self.bandwidth
            row["matmul_share"] = cost.flops / seconds / self.rate
        return row


def best_seconds(row: Row) -> float | None:
    """Of either timer: a graph copies slower than a stream on some cards."""
    times = [row[key] for key in ("eager_seconds", "graph_seconds") if row.get(key)]
    return min(times, default=None)


def summary(timer: str, values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of one step's repetitions, in seconds."""
    if not values:
        return {}
    low, _, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {
        "repetitions": len(values),
        f"{timer}_seconds": statistics.median(values),
        f"{timer}_quartiles": [low, high],
    }


def measure_card(context: Context) -> list[Row]:
    """The card's own copy bandwidth and matmul rate, which all shares refer to."""
    card, gpu = context.device, context.device.type == "cuda"
    size, n = (1 << 30, 8192) if gpu else (1 << 22, 256)
    if gpu:
        size = min(size, torch.cuda.mem_get_info(card)[0] // 8)
    source = torch.ones(size, dtype=torch.uint8, device=card)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=card).to(context.dtype) for _ in range(2))
    steps = {
        f"copy of {size >> 20} MiB": Step(lambda: [target.copy_(source)]),
        f"product of {n} x {n}": rotating(torch.mm, [(a, b)]),
    }
    rows = context.measure("card", steps)
    for row, cost in zip(rows, (Cost(2 * size), product(n, n, n, a.itemsize)), strict=True):
        row |= {"bytes": cost.bytes, "flops": cost.flops}
        if seconds := best_seconds(row):
            if cost.flops:
                context.rate = cost.flops / seconds
            else:
                context.bandwidth = cost.bytes / seconds
    return rows
