"""Comparisons of tiny encoders."""

from __future__ import annotations

import adarank_fast as ada
from adarank_fast.training.loading import MeanPoolClassifier
from tests.tiny_models import tiny
from tests.tiny_texts import EXAMPLES, tokenizer

ARMS = ("adarank", "uniform", "reversed")
OPTIONS: dict = dict(
    average_rank=2, epochs=1, batch_size=8, learning_rates=(1e-3, 1e-2), progress=False
)


def encoder():
    return MeanPoolClassifier(tiny("bert", layers=2), 2)


def run(arms=ARMS, seeds=2, model=encoder, **changes):
    words = dict(tokenizer=tokenizer(), modules_to_save=["head"])
    return ada.compare(
        model, EXAMPLES[:40], EXAMPLES[40:], arms, seeds, **OPTIONS | words | changes
    )


class Killed(Exception):
    pass


def named(name):
    def allocator(problem):
        return problem.uniform

    allocator.__name__ = name
    return allocator
