"""Host time of eager LoRA layers over the frozen ones, without a card.

    python -m bench.bench_host                 (or `make bench-host`): all rows, two minutes
    python -m bench.bench_host --only one      rows whose name has that; nothing is written

What a card's host runs: the GPU path's Python and C++, on CPU tensors so small that the products
take next to nothing. float16 stands for a card's 16-bit types: this package's C++ has no products
for it, so every product is an aten call, as on a card. Triton's compiled kernels are stubs behind
the real `registry.launch`; each call of one adds CHARGE. That is an assumption: what Triton's
launcher (a dozen arguments, an attribute query for each pointer) and the driver take. It is added
for PEFT alike, which launches none; the launches inside aten's own operators are charged to nobody,
and PEFT has twice as many of them. The stubs compute the real products while outputs and gradients
are compared with PEFT's, before anything is timed.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import adarank_fast as ada
from adarank_fast.benchmarking.measure import Step, medians, overhead_ratio, timed
from adarank_kernels.lora import dropout as masks
from adarank_kernels.lora import group, triton_kernels
from adarank_kernels.lora.backends import triton
from adarank_kernels.runtime import native, registry
from bench.blocks import step_of, trained_a_little
from bench.results_file import write_results
from bench.slices import Row, arguments

CHARGE = 5e-6  # seconds a Triton launch, beyond the Python of `registry.launch`
CALLS = 5  # steps a measurement
KINDS = {"q/k/v": (8, 4, 16), "gate/up": (8, 16), "one layer": (8,)}  # the ranks
ROWS = {
    f"{kind}{adapters}{', dropout 0.1' if dropout else ''}": (kind, adapters, dropout)
    for kind in KINDS
    for adapters in ("", ", float32 adapters", ", 4 bit")
    for dropout in (0.0, 0.1)
}
DTYPE = torch.float16


class Stub:
    """In the place of a Triton kernel, and of what it compiles to."""

    launches = 0
    computes = True

    def __init__(self, kernel: Any, product: Callable[..., None]) -> None:
        self.arg_names, self.product = kernel.arg_names, product

    def __getitem__(self, grid: Any) -> Any:
        return self.run

    def run(self, *arguments: Any, **constants: Any) -> Stub:
        Stub.launches += 1
        if Stub.computes:
            self.product(*arguments, *(v for k, v in constants.items() if k in self.arg_names))
        return self


def shrink(X: Tensor, A: Tensor, S: Tensor, seed: Tensor, N: int, K: int, *rest: Any) -> None:
    torch.mm(X * masks.keep_mask(seed, N, K, rest[2] / masks.LEVELS), A.t(), out=S)


def expand(S: Tensor, *rest: Any) -> None:
    Ys, Bs, (factors, table, N) = rest[:4], rest[4:8], rest[8:11]
    for m, start, rank, _, first, out, *_ in table.tolist():
        assert first == 0, "one tile a module"
        Ys[m].view(N, out).addmm_(
            S[:, start : start + rank], Bs[m].t().to(S.dtype), alpha=factors[m]
        )


def drop(X: Tensor, result: Tensor, seed: Tensor, N: int, K: int, *rest: Any) -> None:
    kept = X * masks.keep_mask(seed, N, K, rest[1] / masks.LEVELS)
    result.copy_(kept + result if rest[-1] else kept)


@contextmanager
def gpu_path(extension: bool = True) -> Iterator[None]:
    """CPU tensors take the GPU path; groups made inside run as C++ calls if `extension`."""
    init = group.Group.__init__

    def as_on_a_card(self: Any, *args: Any) -> None:
        init(self, *args)
        self.device_type = "cuda"

    device = torch.device("cpu")
    ready = {(n, device, DTYPE): frozenset(n) for n in (triton.KERNELS, triton.ANY_WIDTH)}
    changes: list[tuple[Any, str, Any]] = [
        (group, "choose_backend", lambda x, factors: triton),
        (group.Group, "__init__", as_on_a_card),
        (group.Group, "_whole_backend", lambda self, x: extension and bool(native.operators())),
        (registry, "_settled", ready),
        (registry, "_compiled", {}),
    ]
    for product in (shrink, expand, drop):
        name = f"{product.__name__}_kernel"
        changes.append((triton_kernels, name, Stub(getattr(triton_kernels, name), product)))
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(patch.object(*change))
        yield


class Layers(nn.Module):
    """Linears that read the same tensor."""

    def __init__(self, kind: str, four_bit: bool) -> None:
        super().__init__()
        width = 64 if four_bit else 16
        for i in range(len(KINDS[kind])):
            linear = nn.Linear(width, width, bias=False, dtype=DTYPE)
            self.add_module(f"linear{i}", in_four_bits(linear) if four_bit else linear)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


def in_four_bits(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    width = linear.in_features
    layer = Linear4bit(width, width, bias=False, compute_dtype=DTYPE, quant_type="nf4")
    layer.load_state_dict({"weight": linear.weight.data})
    return layer.to("cpu")


def models_of(key: str) -> dict[str, nn.Module]:
    """The frozen layers, PEFT's and ours, without the wrapper that a whole model has once."""
    kind, adapters, dropout = ROWS[key]
    torch.manual_seed(0)
    frozen = Layers(kind, "4 bit" in adapters).requires_grad_(False)
    names = [name for name, _ in frozen.named_children()]
    ranks = dict(zip(names, KINDS[kind], strict=True))
    config = LoraConfig(
        target_modules=names, rank_pattern=ranks, alpha_pattern=ranks, lora_dropout=dropout
    )
    peft = trained_a_little(get_peft_model(copy.deepcopy(frozen), config)).train()
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.to(torch.float32 if "float32" in adapters else DTYPE)
    models = {"frozen": frozen, "peft": peft}
    for name in ("ours", "python"):
        models[name] = ada.accelerate(copy.deepcopy(peft))
    return {"frozen": frozen} | {n: m.base_model.model for n, m in models.items() if n != "frozen"}


def steps_of_row(key: str) -> dict[str, Step]:
    """The row's steps, checked; within `gpu_path`."""
    models = models_of(key)
    frozen = models["frozen"]
    width = 64 if "4 bit" in key else 16
    x = torch.randn(1, 2, width, dtype=DTYPE, requires_grad=True)
    dYs = [torch.randn(1, 2, width, dtype=DTYPE) for _ in frozen.children()]
    steps = {name: step_of(model, x, dYs) for name, model in models.items()}
    p = ROWS[key][2]

    def dropped(self: nn.Module, X: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=()):  # the mask that a group draws
            torch.manual_seed(0)
            mask = masks.draw_mask(X.flatten(0, -2), masks.keep_probability(p))
            return X * mask.view(X.shape) * masks.keep_scale(p)

    def computed(name: str) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            outputs = models[name](x)
        torch.manual_seed(0)
        return [*outputs, *steps[name]()]

    Stub.computes = True
    with patch.object(nn.Dropout, "forward", dropped):
        wanted = computed("peft")
        for name in set(steps) - {"frozen", "peft"}:
            with gpu_path(name == "ours"):
                for _ in range(3):  # the first one finds the group
                    found = computed(name)
            for f, w in zip(found, wanted, strict=True):
                error = ((f - w).float().norm() / w.float().norm()).item()
                if not error <= 1e-2:
                    raise ArithmeticError(f"{key}: {name} differs from PEFT by {error:.2g}")
    Stub.computes = False
    return steps


def launches_of(step: Step) -> int:
    before = Stub.launches
    step()
    return Stub.launches - before


def measured(key: str, repetitions: int) -> Row:
    """One row of the results, in seconds a step."""
    with gpu_path():
        steps = steps_of_row(key)
        launches = {name: launches_of(step) for name, step in steps.items()}

        def several(step: Step) -> Step:
            return lambda: [step() for _ in range(CALLS)]

        gc.disable()
        several_steps = {name: several(step) for name, step in steps.items()}
        seconds = timed(several_steps, repetitions, 60.0, time.thread_time)
        gc.enable()
    charged = {n: [v / CALLS + CHARGE * launches[n] for v in vs] for n, vs in seconds.items()}
    row = {"seconds": charged}
    found = {"repetitions": repetitions, "charge": CHARGE, "launches": launches}
    found["median_seconds"] = medians(charged)
    for name in set(steps) - {"frozen", "peft"}:
        found[f"{name}_over_peft"] = overhead_ratio([row], name, "peft")
    return found


def main() -> None:
    parser = arguments("Host time of eager LoRA layers, without a card.", repetitions=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for key in [key for key in ROWS if options.only in key]:
        rows[key] = row = measured(key, options.repetitions)
        middle = row["median_seconds"]
        told = [f"{n} {(v - middle['frozen']) * 1e6:.0f}" for n, v in middle.items()]
        ratios = [f"{n} {row[n]['ratio']:.2f}" for n in row if n.endswith("over_peft")]
        print(f"{key}: us over frozen: {', '.join(told[1:])}; {', '.join(ratios)}", flush=True)
    if not options.only:
        write_results("host", rows, keep=False)


if __name__ == "__main__":
    main()
