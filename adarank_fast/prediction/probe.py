"""Options of a probe, limits of probing, and their checks. No torch here."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from adarank_fast.errors import AdarankError, AdarankTypeError
from adarank_fast.options import (
    DTYPES,
    OUTPUTS,
    Range,
    check_choice,
    check_number,
    find_function,
    option,
)
from adarank_fast.plan.uncertainty import AdaptiveTrials
from adarank_kernels.disagreement.choices import METRICS

if TYPE_CHECKING:
    import torch

GROUP = "adarank.outputs"  # of entry points


def parse_trials(text: str) -> int | AdaptiveTrials:
    """A number of trials from text: "5" is 5, "2-10" AdaptiveTrials(2, 10)."""
    numbers = text.split("-")
    if not all(n.isdecimal() and len(n) < 10 and int(n) for n in numbers) or len(numbers) > 2:
        raise AdarankError(
            f"--trials {text!r} is neither a positive number nor a range such as 2-10"
        )
    return int(text) if len(numbers) == 1 else AdaptiveTrials(int(numbers[0]), int(numbers[1]))


def parse_gigabytes(gigabytes: float) -> int:
    """Gigabytes -> bytes."""
    return int(check_number("--max-memory", gigabytes, Range(1e-9, 1e9, whole=False)) * 1e9)


@dataclass(frozen=True)
class Probe:
    """How often modules are perturbed, and which change of which output is measured.

    Attributes:
        output: the output whose change is measured: "auto" (a language model's logits if its head
            was loaded, else the mean-pooled last hidden state), "pooler", "last_hidden_state",
            "logits", or a callable that takes the model's outputs and returns a [B, ...] tensor.
            The callable may be named: `module:function`, or an entry point of the group
            `adarank.outputs`.
        metric: "l1", "tv", "kl", "js" or "argmax"; see `disagreement_sums`.
        trials: perturbations of each module, or `AdaptiveTrials`: as many as its rank needs.
        seed: of the noise. The plan depends on it, not on batch sizes or the order of modules.
        dtype: run the probes in this floating-point type (a torch.dtype or its name), on a copy of
            the weights; None: the model's own. The noise keeps the scale of the model's weights.
    """

    output: str | Callable[[Any], Any] = option(
        "auto", f"Output that is compared: {', '.join(OUTPUTS)} or module:function.", kind=str
    )
    metric: str = option("l1", f"Measure of its change: {', '.join(METRICS)}.")
    trials: int | AdaptiveTrials = option(
        5,
        "Perturbations of each module; 2-10 means 2 to 10, as its rank needs.",
        kind=str,
        parse=parse_trials,
    )
    seed: int = option(0, "Seed of the noise and of the choice of texts.")
    dtype: torch.dtype | str | None = option(
        None,
        "Run the probes on a copy in this type, such as bfloat16.",
        flag="probe_dtype",
        kind=str | None,
    )

    def __post_init__(self) -> None:
        if not callable(self.output) and self.output not in OUTPUTS:
            name = self.output
            found = find_function("output", name, GROUP) if isinstance(name, str) else None
            if found is None:
                raise AdarankError(
                    f"output={name!r} is unknown; use one of {', '.join(OUTPUTS)}, module:function "
                    "or a callable"
                )
            object.__setattr__(self, "output", found)
        check_choice("metric", self.metric, METRICS)
        if not isinstance(self.trials, AdaptiveTrials):
            object.__setattr__(self, "trials", check_number("trials", self.trials))
        object.__setattr__(self, "seed", check_number("seed", self.seed))
        if isinstance(self.dtype, str):
            check_choice("dtype", self.dtype, DTYPES)
        elif self.dtype is not None and getattr(self.dtype, "is_floating_point", None) is not True:
            raise AdarankTypeError(
                f"dtype must be a floating-point torch.dtype, got {self.dtype!r}"
            )


@dataclass(frozen=True)
class Limits:
    """How much time and memory probing may take, and where finished probes are kept.

    Attributes:
        checkpoint: a file that finished probes are written to and read from: after an
            interruption, the same call continues from there.
        max_seconds: begin no further probes after this time; every module needs one trial.
        max_memory: bytes of tensors that probing may hold beside the model, its outputs and the
            activations it resumes from; at least one variant is probed at a time. None: on a GPU
            half of what is free, elsewhere what keeps all within 1.5 times the model and one
            forward over the largest batch. It changes how fast ranks are found and, beyond
            rounding, not which; the same number gives the same bits. The plan's settings say
            which it was.
    """

    checkpoint: str | os.PathLike[str] | None = option(
        None,
        "File for finished probes; an interrupted prediction continues from it.",
        kind=Path | None,
    )
    max_seconds: float | None = option(None, "Start no probes after this many seconds.")
    max_memory: int | None = option(
        None,
        "GB of memory that probing may use beside the model.",
        kind=float | None,
        parse=parse_gigabytes,
    )

    def __post_init__(self) -> None:
        for name in ("max_seconds", "max_memory"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_number(name, value))


class ProbeOptions(TypedDict, total=False):
    """The options of `Probe` and `Limits` as keywords, for type checkers."""

    output: str | Callable[[Any], Any]
    metric: str
    trials: int | AdaptiveTrials
    seed: int
    dtype: torch.dtype | str | None
    checkpoint: str | os.PathLike[str] | None
    max_seconds: float | None
    max_memory: int | None
