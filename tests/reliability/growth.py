"""Many training steps and predictions in one process: nothing grows with their number."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Set
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

import adarank_fast as ada
from tests.adapters.fused_models import loss_of, mixed
from tests.tiny_models import batch, tiny

PACKAGES = ("adarank_fast", "adarank_kernels")
HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
RESIDENT = 2 << 20  # bytes within which two medians of the resident memory are the same
SAMPLES = 16  # of a run
LENGTHS = ((9, 7, 9, 4), (5, 3), (12, 1, 2), (8,))

Sizes = dict[str, int]


def caches() -> Iterator[tuple[str, int]]:
    """What the packages' modules hold, by name: containers, and functions that remember."""
    for module in list(sys.modules.values()):
        if module is None or not module.__name__.startswith(PACKAGES):
            continue
        for name, value in list(vars(module).items()):
            if name.startswith("__"):
                continue
            key = f"{module.__name__}.{name}"
            if hasattr(value, "cache_info"):
                yield key, value.cache_info().currsize
            elif isinstance(value, (Mapping, MutableSequence, Set)):
                yield key, len(value)


def sizes(model: nn.Module) -> Sizes:
    """All that may not grow: of the process, and of a model that is used again and again."""
    gc.collect()
    types = Counter(map(type, gc.get_objects()))

    def alive(wanted: Callable[[type], bool]) -> int:
        return sum(count for one, count in types.items() if wanted(one))

    statm = Path("/proc/self/statm").read_text().split()
    return {
        "resident bytes": int(statm[1]) * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "hooks": sum(len(getattr(m, hooks)) for m in model.modules() for hooks in HOOKS),
        "tensors": alive(lambda one: issubclass(one, torch.Tensor)),
        "modules": alive(lambda one: issubclass(one, nn.Module)),
        "our objects": alive(lambda one: str(one.__module__).startswith(PACKAGES)),
        "pytree types": len(_pytree.SUPPORTED_NODES),
        **dict(caches()),
    }


def grown(samples: list[Sizes]) -> list[str]:
    """What is larger in the last quarter of the samples than in the second, where all is warm."""
    quarter = len(samples) // 4
    odd = []
    for name in samples[-1]:
        early, late = (
            [sample.get(name, 0) for sample in part]
            for part in (samples[quarter : 2 * quarter], samples[-quarter:])
        )
        if name == "resident bytes":
            if statistics.median(late) - statistics.median(early) > RESIDENT:
                odd.append(f"{name}: {early} became {late}")
        elif min(late) > max(early):
            odd.append(f"{name}: {max(early)} became {min(late)}")
    return odd


class Training:
    """Steps of fused models of two kinds; now and then an evaluation, a restore, a new adapter."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.models = {kind: ada.accelerate(mixed(kind)) for kind in ("llama", "bert")}
        self.optimizers = {
            kind: torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
            for kind, model in self.models.items()
        }
        self.everything = nn.ModuleList(self.models.values())

    def step(self) -> None:
        kind = self.random.choice(("llama", "bert"))
        model, what = self.models[kind], self.random.randrange(100)
        if what == 0:
            ada.restore(model)
            ada.accelerate(model)
        elif what == 1:
            model.add_adapter("second", model.peft_config["default"])
            model.set_adapter("second")
            loss_of(model, kind).backward()
            model.zero_grad()
            model.set_adapter("default")
            model.delete_adapter("second")
        elif what < 6:
            with torch.no_grad():
                model.eval()(**batch(kind, self.random.choice(LENGTHS)))
            model.train()
        loss_of(model, kind, seed=self.random.randrange(50)).backward()
        self.optimizers[kind].step()
        self.optimizers[kind].zero_grad()


class Predictions:
    """Predictions on models of three kinds, with other options each time."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.models = {kind: tiny(kind, layers=1) for kind in ("llama", "bert", "deberta")}
        self.everything = nn.ModuleList(self.models.values())

    def step(self) -> None:
        kind = self.random.choice(tuple(self.models))
        batches = [batch(kind, lengths) for lengths in self.random.sample(LENGTHS, 2)]
        ada.predict_ranks(
            self.models[kind],
            batches,
            average_rank=2,
            target_modules=self.random.choice(("attention", "all-linear")),
            trials=self.random.choice((1, 2)),
            seed=self.random.randrange(1000),
            progress=False,
        )


def watch(
    make: Callable[[Random], Training | Predictions], seconds: float, seed: int, most: float
) -> tuple[int, list[str]]:
    """Take steps: (how many, what has grown)."""
    random, started = Random(seed), time.monotonic()
    work = make(random)
    gc.collect()
    gc.freeze()  # only what is made from here on is looked through and counted
    try:
        count, samples = 0, [sizes(work.everything)]
        while count < most and (passed := time.monotonic() - started) < seconds:
            work.step()
            count += 1
            if max(count / most, passed / seconds) * SAMPLES > len(samples):
                samples.append(sizes(work.everything))
    finally:
        gc.unfreeze()
    return count, grown(samples) if len(samples) >= SAMPLES // 2 else []


def soak(
    seconds: float, seed: int = 0, steps: float = float("inf"), predictions: float = float("inf")
) -> dict[str, Any]:
    """Half of the time each for training and for predictions."""
    half = seconds / 2
    trained, faults = watch(Training, half, seed, steps)
    predicted, more = watch(Predictions, half, seed, predictions)
    faults = [f"{trained} training steps: {line}" for line in faults] + [
        f"{predicted} predictions: {line}" for line in more
    ]
    return {"training steps": trained, "predictions": predicted, "faults": faults}
