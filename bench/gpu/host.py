"""What launches cost the host, which differs four-fold from one machine to another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from adarank_kernels.runtime import registry
from bench.gpu.checks import runs_kernels
from bench.gpu.context import Context, Row
from bench.gpu.timing import Host, Step

if registry.HAS_TRITON:
    from bench.gpu.empty_kernels import no_arguments, six_arguments

CALLS = 200  # a measurement


def launches_row(context: Context, row: str) -> list[Row]:
    """Microseconds a call: a loop of Python, torch's smallest operators, Triton's empty kernels."""
    device = context.device
    a, b, out = (torch.ones(16, 16, device=device) for _ in range(3))
    tensors = [torch.ones(16, device=device) for _ in range(4)]
    integers = [tensor.data_ptr() for tensor in tensors]
    calls: dict[str, Callable[[], object]] = {
        "a call of Python": lambda: None,
        "torch.mm of 16 x 16": lambda: torch.mm(a, b),
        "torch.mm into an output": lambda: torch.mm(a, b, out=out),
        "add_ in place": lambda: out.add_(1.0),
    }
    if device.type == "cuda":
        calls["an empty kernel of torch's"] = lambda: torch.cuda._sleep(1)
    why = None if runs_kernels(device) else "not run: no Triton here"
    names = ["no argument", "4 tensors", "4 addresses", "4 tensors, found again"]
    refused = {f"Triton, {name}": why for name in names}
    if why is None:
        launch = partial(registry.launch, six_arguments, ("host", device), (1, 1))
        made: list[Callable[[], object]] = [
            lambda: no_arguments[1, 1](num_warps=1),
            lambda: six_arguments[1, 1](*tensors, 16, 1.0, num_warps=1),
            lambda: six_arguments[1, 1](*integers, 16, 1.0, num_warps=1),
            lambda: launch([*tensors, 16, 1.0], {"num_warps": 1}),
        ]
        if registry.INTERPRETED:  # addresses mean nothing there
            refused["Triton, 4 addresses"] = "not run: Triton's interpreter is on"
        calls |= zip(refused, made, strict=True)

    def repeated(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                call()

        return run

    steps = {name: Step(repeated(call), calls=CALLS) for name, call in calls.items()}
    with registry.on_device(device):
        return replace(context, timers=lambda: [Host()]).measure(row, steps, refused=refused)
