"""All that is timed, by name. Imports nothing heavy: machines without a GPU list it too."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("bfloat16", "float16", "float32")
KINDS = ("SmolLM2-135M", "Qwen3-0.6B", "Llama-3-8B")

BLOCKS = {  # name -> model, targets, dropout
    f"{kind}, {targets}{', dropout 0.1' if dropout else ''}": (kind, targets, dropout)
    for kind in KINDS
    for targets, dropout in (("attention", 0.0), ("all-linear", 0.0), ("all-linear", 0.1))
}
GROUPS = {  # name -> model, group of linears that share an input
    f"{kind} {group}": (kind, group)
    for kind, group in (
        *((kind, "q/k/v") for kind in KINDS),
        ("Llama-3-8B", "gate/up"),
        ("Llama-3-8B", "down"),
    )
}
PAIRS = {"pairs": 512}  # tokens
DISAGREEMENTS = {  # name -> model, metric, whether against a reference instead of all pairs
    f"{metric}, head of {kind}{', reference' if reference else ''}": (kind, metric, reference)
    for kind in KINDS
    for metric, reference in (("l1", False), ("tv", False), ("tv", True))
}
PHILOX = {"philox": (4096, 4096)}
PREDICTIONS = {  # name -> model, targets, trials
    "ranks of MiniLM, attention": ("MiniLM", "attention", 5),
    "ranks of MPNet-base, attention": ("MPNet-base", "attention", 5),
    "ranks of SmolLM2-135M, all-linear": ("SmolLM2-135M", "all-linear", 1),
    "ranks of Qwen3-0.6B, all-linear": ("Qwen3-0.6B", "all-linear", 1),
}

MEMORIES = {"8 GiB": 8 << 30, "32 GiB": 32 << 30}  # max_memory of predictions, beside its default
HOST = ("launches from the host",)
EAGER = {  # name -> model, sequences, tokens, dropout
    f"{kind}, {batch} x {tokens:,}{', dropout 0.1' if dropout else ''}, host": (
        kind, batch, tokens, dropout,
    )
    for kind in KINDS
    for batch, tokens in ((1, 1024), (4, 1024))
    for dropout in (0.0, 0.1)
}  # fmt: skip
PROFILES = {  # name -> model; of its block, or of its prediction
    "kernels of a Qwen3-0.6B block": "Qwen3-0.6B",
    "kernels of a Llama-3-8B block": "Llama-3-8B",
    "kernels of ranks of Qwen3-0.6B": "Qwen3-0.6B",
}


@dataclass(frozen=True)
class Training:
    """A row of whole training steps.

    Attributes:
        layers: of the model; None: all.
        batch, tokens: sequences a step, and tokens of each.
        base: the base's weights: "dense" or "nf4".
        checkpointed: gradient checkpointing.
        packed: several texts in a sequence, told apart by position_ids.
        others: whether compiled variants and other libraries' code are timed too.
        steps: optimiser steps after which the loss is compared; 0: it is not.
    """

    kind: str
    layers: int | None
    batch: int
    tokens: int
    base: str = "dense"
    checkpointed: bool = False
    packed: bool = False
    others: bool = True
    steps: int = 0


TRAINING = {  # in the order of what is asked first
    "Qwen3-0.6B, 1 x 2,048": Training("Qwen3-0.6B", None, 1, 2048, steps=20),
    "Qwen3-0.6B, 8 x 2,048": Training("Qwen3-0.6B", None, 8, 2048),
    "Llama-3-8B, 8 layers, 1 x 4,096": Training("Llama-3-8B", 8, 1, 4096),
    "Llama-3.2-1B, 4 x 2,048": Training("Llama-3.2-1B", None, 4, 2048),
    "Qwen3-0.6B, 8 x 2,048, checkpointed": Training(
        "Qwen3-0.6B", None, 8, 2048, checkpointed=True, others=False
    ),
    "Qwen3-0.6B, 1 x 8,192, packed": Training(
        "Qwen3-0.6B", None, 1, 8192, packed=True, others=False
    ),
}
QLORA = {
    "Llama-3-8B, 4 layers, NF4, 1 x 2,048": Training(
        "Llama-3-8B", 4, 1, 2048, base="nf4", others=False
    ),
}

SECTIONS = {  # of the file: jobs in their order
    "host": [*HOST],
    "blocks": [*BLOCKS],
    "eager": [*EAGER],
    "kernels": [*GROUPS, *PAIRS, *PHILOX],
    "profiles": [*PROFILES],
    "ops": [*DISAGREEMENTS],
    "predictions": [*PREDICTIONS],
    "training": [*TRAINING],
    "qlora": [*QLORA],
}
MINUTES = 9.0  # of a part: a device may be lent for ten at a time
PARTS = {  # jobs that match, and whether every op is checked first: a command each, for one card
    "1": ("^(host|predictions|profiles)|^ops: tv.*reference", True),
    "2": ("^(eager|qlora)", False),
    "3": ("^training", False),
    "4": ("^(kernels|blocks)", False),
}


def names() -> list[str]:
    """Every job: "section: row"."""
    return [f"{section}: {row}" for section, rows in SECTIONS.items() for row in rows]
