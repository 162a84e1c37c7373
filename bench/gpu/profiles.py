"""Where the time goes: kernels of one block's training step, and of one prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.blocks import ADAPTERS32, backward_of
from bench.counts import SHAPES
from bench.gpu.checks import DEFAULT, LORA_SETS, choose
from bench.gpu.context import Context, Row
from bench.gpu.predictions import problem_of
from bench.gpu.rows import PROFILES
from bench.gpu.steps import block_models
from bench.gpu.timing import reason, release, wait

CALLS = 3  # of a step, profiled together
LISTED = 40  # kernels
LAUNCHES = ("cudaLaunch", "cuLaunch", "hipLaunch", "hipExtLaunch", "hipModuleLaunch",
            "cudaMemcpyAsync", "cudaMemsetAsync", "hipMemcpyAsync", "hipMemsetAsync",
            "cudaGraphLaunch", "hipGraphLaunch")  # fmt: skip


def profiled(run: Callable[[], object], device: torch.device, calls: int = 1) -> dict[str, Any]:
    """Kernels by their time and launches, a call; operators where there is no card."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(calls):
            run()
        wait()
    events = found.key_averages()
    if on_gpu:
        times = {e.key: e.self_device_time_total for e in events if e.device_type != DeviceType.CPU}
    else:
        times = {e.key: e.self_cpu_time_total for e in events}
    counts = {e.key: e.count for e in events if e.key in times}
    longest = sorted(times, key=lambda name: -times[name])
    launches = sum(e.count for e in events if e.key.startswith(LAUNCHES))
    return {
        "launches": launches / calls,
        "kernel_microseconds": sum(times.values()) / calls,
        "kernels": [
            {"name": name[:120], "count": counts[name] / calls, "microseconds": times[name] / calls}
            for name in longest[:LISTED]
        ],
    }


def profile_row(context: Context, row: str) -> list[Row]:
    """A table of kernels for each variant."""
    kind = PROFILES[row]
    found: list[Row] = []
    runs = _of_prediction if "ranks" in row else _of_block
    for name, run in runs(context, kind).items():
        try:
            for _ in range(2):
                run()
            table = profiled(run, context.device, 1 if "ranks" in row else CALLS)
            found.append({"row": row, "variant": name, "status": "ok"} | table)
        except Exception as error:  # the others are still worth a look
            found.append({"row": row, "variant": name, "status": reason(error)})
            release()
    return found


def _of_block(context: Context, kind: str) -> dict[str, Callable[[], object]]:
    labels = context.sets(LORA_SETS)
    choose(context.device, labels.get(DEFAULT, ()))
    models = block_models(context, kind, "all-linear", 0.0)
    x, dy = (
        torch.randn(*context.tokens, SHAPES[kind].width, device=context.device).to(context.dtype)
        for _ in range(2)
    )
    x.requires_grad_()
    runs = {}
    for name in ("frozen", "peft", "ours", ADAPTERS32):
        if name in models:
            clear, run = backward_of(models[name].train(), x, dy)

            def both(clear: Callable[[], None] = clear, run: Any = run) -> None:
                clear()
                run()

            runs[name] = both
    return runs


def _of_prediction(context: Context, kind: str) -> dict[str, Callable[[], object]]:
    problem = problem_of(context, kind, "all-linear", 1)
    problem.model.to(context.dtype)
    return {"ours": problem.predict}
