"""Threads that serve one accelerated model, from its first request on."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

import adarank_fast as ada
from tests.adapters.fused_models import mixed
from tests.tiny_models import batch

KINDS = ("llama", "bert", "gpt2", "t5")
THREADS = 8
REQUESTS = 4  # of a thread, on one model
CLOSE = 1e-5  # rounding: a first forward goes through PEFT's layers, a later one is fused
WAIT = 120.0  # seconds

Request = dict[str, Any]


def answer(model: Any, request: Request) -> Tensor:
    with torch.inference_mode():
        return model(**request)[0].clone()


def together(work: Callable[[int], None], threads: int) -> list[str]:
    """Run `work(0)`, `work(1)`... at once; what was raised, or did not end."""
    start, faults = threading.Barrier(threads), []

    def run(index: int) -> None:
        try:
            start.wait(timeout=WAIT)
            work(index)
        except Exception as error:
            faults.append(f"thread {index}: {error!r}")

    running = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(timeout=WAIT)
    return faults + ["a thread did not end" for thread in running if thread.is_alive()]


def one_model(kind: str, random: Random, example: bool, threads: int = THREADS) -> list[str]:
    """Serve a model that nobody has used yet: answers that differ from those of one thread."""
    lengths = [
        tuple(random.randint(1, 12) for _ in range(random.randint(1, 4)))
        for _ in range(threads * REQUESTS)
    ]
    requests = [batch(kind, one, seed=random.randrange(100)) for one in lengths]
    options = {"example": batch(kind)} if example else {}
    alone, served = (ada.accelerate(mixed(kind).eval(), **options) for _ in range(2))
    expected = [answer(alone, request) for request in requests]
    answers: list[Tensor | None] = [None] * len(requests)

    def work(index: int) -> None:
        for number in range(index, len(requests), threads):
            answers[number] = answer(served, requests[number])

    faults = together(work, threads)
    after = [answer(served, request) for request in requests]  # by this thread
    for found, what in ((answers, "among eight threads"), (after, "afterwards")):
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            if other is not None and not torch.allclose(one, other, rtol=CLOSE, atol=CLOSE):
                off = (one - other).abs().max()
                faults.append(f"request {number}, {what}: differs by {off:.2g}")
    return [f"{kind}{', with an example' * example}: {fault}" for fault in faults]


def soak(seconds: float, seed: int = 0, most: float = float("inf")) -> dict[str, Any]:
    """One model after the other, of each kind, while threads change places very often."""
    random, deadline = Random(seed), time.monotonic() + seconds
    faults: list[str] = []
    models = 0
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        while models < most and time.monotonic() < deadline:
            kind = KINDS[models % len(KINDS)]
            faults += one_model(kind, random, example=models // len(KINDS) % 2 == 1)
            models += 1
    finally:
        sys.setswitchinterval(before)
    return {"models": models, "requests": models * THREADS * REQUESTS, "faults": faults}
