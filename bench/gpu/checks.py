"""Every Triton kernel and every op against float64, before anything is timed.

The criterion is the project's: the error against float64 is at most twice that of plain PyTorch in
the same dtype, plus 1e-6 (of the largest value, where that is above 1: in float32 the order of a
sum moves it by as much). A kernel that fails its own check is not used in what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from adarank_kernels import (
    grouped_lora_linear,
    grouped_lora_linear_ref,
    lora_linear,
    lora_linear_ref,
    pairwise_disagreement,
    pairwise_disagreement_ref,
    philox_normal,
    philox_normal_ref,
)
from adarank_kernels.disagreement.op import METRICS
from adarank_kernels.runtime import registry
from bench.gpu.timing import reason, release
from tests.kernels.lora_cases import make_group

Check = dict[str, Any]  # "op", "case", "kernels", "dtype", "status", "share" of the allowed error
Named = dict[str, Tensor]

LORA = ("lora_shrink", "lora_expand", "lora_drop")
WAITING = ("lora_grad_s", "lora_grad_b", "lora_grad_a")  # for a card's verdict
DEFAULT = "default"
# What may run beside the vendor's GEMMs: label -> kernels.
LORA_SETS = {"vendor GEMMs": (), DEFAULT: LORA, "+ backward": (*LORA, *WAITING)}
DISAGREEMENT_SETS = {"vendor GEMMs": (), "+ pairs": ("disagreement_pairs",)}
PHILOX_SETS = {"plain torch": (), "Philox kernel": ("philox_normal",)}
OWN = "16-bit"  # "dtype" of a kernel's own check, which tries both
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def runs_kernels(device: torch.device) -> bool:
    return registry.HAS_TRITON and (device.type == "cuda" or registry.INTERPRETED)


def choose(device: torch.device, kernels: Sequence[str]) -> None:
    """From now on exactly these Triton kernels run on the device."""
    registry.choose(kernels, device)


def check_kernels(device: torch.device) -> Iterator[Check]:
    """Each kernel's own check, as it runs before a kernel is used for the first time."""
    for name in registry._checks if runs_kernels(device) else ():

        def check(name: str = name) -> float:
            with registry.on_device(device), torch.no_grad():
                registry._checks[name](device)
            return 1.0

        yield _checked(check, name, "its own check", name, OWN) | {"share": None}


def usable_sets(
    sets: dict[str, tuple[str, ...]], checks: Sequence[Check]
) -> dict[str, tuple[str, ...]]:
    """The sets all of whose kernels passed their own checks; of the default set, those that did."""
    passed = {c["op"] for c in checks if c["dtype"] == OWN and c["status"] == "passed"}
    usable = {}
    for label, kernels in sets.items():
        left = tuple(name for name in kernels if name in passed)
        if left == kernels or (label == DEFAULT and left):
            usable[label] = left
    return usable


def check_ops(device: torch.device, timed: str, kernels: Sequence[Check]) -> Iterator[Check]:
    """Every op with every usable set of kernels in the dtype that will be timed, and in others."""
    for dtype in dict.fromkeys((timed, *DTYPES)):
        for sets, checks in (
            (LORA_SETS, _lora_checks),
            (DISAGREEMENT_SETS, _disagreement_checks),
            (PHILOX_SETS, _noise_checks),
        ):
            usable = usable_sets(sets, kernels)
            if dtype != timed:  # what users get, only
                label = DEFAULT if DEFAULT in usable else list(usable)[-1]
                usable = {label: usable[label]}
            for op, case, check in checks(device, DTYPES[dtype]):
                for label, chosen in usable.items():
                    choose(device, chosen)
                    yield _checked(check, op, case, label, dtype)


def _checked(check: Callable[[], float], op: str, case: str, kernels: str, dtype: str) -> Check:
    found: Check = {"op": op, "case": case, "kernels": kernels, "dtype": dtype, "share": None}
    try:
        share = check()
    except Exception as error:
        release()  # raises where the card is lost
        return found | {"status": f"failed: {reason(error)}"}
    return found | {"status": "passed", "share": share}


def compare(
    ours: Named,
    torchs: Named,
    exact: Named,
    floor: float = 1e-6,
    size: Callable[[Tensor], Tensor] = lambda error: error.abs().max(),
) -> float:
    """The largest share of the allowed error; raises where one is above it."""
    worst = 0.0
    for name, truth in exact.items():
        if ours[name].shape != truth.shape:
            raise ArithmeticError(f"{name} is {list(ours[name].shape)}, not {list(truth.shape)}")
        if not truth.numel():
            continue
        error = size(ours[name].double() - truth).item()
        scale = max(1.0, size(truth).item())
        allowed = 2 * size(torchs[name].double() - truth).item() + floor * scale
        if not error <= allowed:
            raise ArithmeticError(f"{name}: error {error:.3g} above {allowed:.3g}")
        worst = max(worst, error / allowed)
    return worst


def numbers(device: torch.device, *size: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, float64, exact in bfloat16, the same on every device."""
    generator = torch.Generator().manual_seed(sum(size))
    drawn = torch.randn(*size, generator=generator, dtype=torch.float64) * scale
    return drawn.bfloat16().double().to(device)


# LoRA: outputs and every gradient, the base's included

Cases = Iterator[tuple[str, str, Callable[[], float]]]
GROUPS: dict[str, Any] = {
    "ragged, ranks 0 to 64": ((3, 67), 200, (0, 1, 3, 8, 24, 64), (40, 96, 7, 33, 64, 128)),
    "aligned, ranks 8 to 24": ((515,), 512, (8, 24, 16), (512, 128, 384)),
}


def _lora_checks(device: torch.device, dtype: torch.dtype) -> Cases:
    ops = grouped_lora_linear, grouped_lora_linear_ref
    singles = _grouped(lora_linear), _grouped(lora_linear_ref)
    cases = [("grouped_lora_linear", *ops, case, group) for case, group in GROUPS.items()]
    cases.append(("lora_linear", *singles, "rank 6", ((4, 65), 96, (6,), (50,))))
    for name, ours, plain, case, group in cases:
        for dropout in (0.0, 0.3):
            for adapters in dict.fromkeys((dtype, torch.float32)):
                seed = torch.tensor([2**61 + 5], device=device) if dropout else None
                options = {"train_base": True, "dropout": dropout, "seed": seed}

                def check(
                    ours: Any = ours, plain: Any = plain, group: Any = group,
                    options: Any = options, adapters: Any = adapters,
                ) -> float:  # fmt: skip
                    made = make_group(*group, **options)
                    low = made.to(dtype, adapters, device)
                    exact = made.to(torch.float64, device=device).results(plain)
                    return compare(low.results(ours), low.results(plain), exact)

                said = "" if adapters == dtype else ", float32 adapters"
                yield name, f"{case}, dropout {dropout}{said}", check


def _grouped(op: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """The op of one layer, called as that of a group."""

    def grouped(x: Tensor, *lists: Sequence[Any], **options: Any) -> list[Tensor]:
        return [op(x, *(values[0] for values in lists), **options)]

    return grouped


# Disagreement, noise

OUTPUTS = (5, 300, 64, 500)  # variants, tokens, width, outputs


def _disagreement_checks(device: torch.device, dtype: torch.dtype) -> Cases:
    K, N, D, V = OUTPUTS
    base, noise = numbers(device, N, D), numbers(device, K, N, D)
    hidden, weight = (base + 0.1 * noise).to(dtype), numbers(device, V, D, scale=D**-0.5).to(dtype)
    bias = numbers(device, V).to(dtype)
    for metric in METRICS:
        for reference in (None, hidden[0]):

            def check(metric: str = metric, reference: Tensor | None = reference) -> float:
                def run(op: Callable[..., Tensor], to: torch.dtype) -> Named:
                    ref = None if reference is None else reference.to(to)
                    given = (hidden.to(to), weight.to(to), bias.to(to))
                    return {"d": op(*given, metric=metric, reference=ref)}

                # argmax counts tokens; in 16 bits a tie may be a rounding apart in two of them
                floor = 2 / N if metric == "argmax" and dtype.itemsize == 2 else 1e-6
                exact = run(pairwise_disagreement_ref, torch.float64)
                torchs = run(pairwise_disagreement_ref, dtype)
                return compare(run(pairwise_disagreement, dtype), torchs, exact, floor)

            how = "all pairs" if reference is None else "against a reference"
            yield "pairwise_disagreement", f"{metric}, {how}", check


def _noise_checks(device: torch.device, dtype: torch.dtype) -> Cases:
    def normals() -> float:
        exact = {"E": philox_normal_ref((4099,), 2**63 + 7, device, torch.float64)}
        torchs = {"E": philox_normal((4099,), 2**63 + 7, "cpu").to(device, dtype)}
        return compare({"E": philox_normal((4099,), 2**63 + 7, device, dtype)}, torchs, exact)

    yield "philox_normal", "4099 numbers", normals
