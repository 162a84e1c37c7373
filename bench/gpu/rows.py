"""All that is timed, by name. Imports nothing heavy: machines without a GPU list it too."""

from __future__ import annotations

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
DISAGREEMENTS = {  # name -> model, metric
    f"{metric}, head of {kind}": (kind, metric) for kind in KINDS for metric in ("l1", "tv")
}
PHILOX = {"philox": (4096, 4096)}
PREDICTIONS = {  # name -> model, targets, trials
    "ranks of MiniLM, attention": ("MiniLM", "attention", 5),
    "ranks of MPNet-base, attention": ("MPNet-base", "attention", 5),
    "ranks of SmolLM2-135M, all-linear": ("SmolLM2-135M", "all-linear", 1),
    "ranks of Qwen3-0.6B, all-linear": ("Qwen3-0.6B", "all-linear", 1),
}

SECTIONS = {  # of the file: jobs in their order
    "blocks": [*BLOCKS],
    "kernels": [*GROUPS, *PAIRS, *PHILOX],
    "ops": [*DISAGREEMENTS],
    "predictions": [*PREDICTIONS],
}


def names() -> list[str]:
    """Every job: "section: row"."""
    return [f"{section}: {row}" for section, rows in SECTIONS.items() for row in rows]
