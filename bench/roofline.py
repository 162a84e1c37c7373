"""Projected times of LoRA steps on GPUs that nobody measured here: bytes and FLOPs over peak rates.

    python -m bench.roofline            (or `make roofline`)

Every figure is a projection; `python -m bench.gpu` measures. Needs no GPU.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from bench.counts import PASSES, SHAPES, Cost, Shape, pass_elements
from bench.pages import table, template


class Card(NamedTuple):
    """Peak rates of the vendor's data sheet."""

    bandwidth: float  # bytes a second
    rate: float  # dense bfloat16 FLOPs a second

    def seconds(self, cost: Cost) -> float:
        """At the share of the peaks that well-tuned code is assumed to reach."""
        return cost.seconds(BANDWIDTH_REACHED * self.bandwidth, RATE_REACHED * self.rate)


CARDS = {"A100": Card(2.039e12, 312e12), "H100": Card(3.35e12, 989.4e12)}
BANDWIDTH_REACHED, RATE_REACHED = 0.9, 0.7
MODELS = ("Llama-3-8B", "Qwen3-0.6B")
RANKS = (8, 16, 64)
TOKENS = 8192  # a step
SEQUENCE = 2048  # tokens that attend to each other
BYTES = 2  # of a bfloat16 element
STORED_PASSES = 6  # over [tokens, rank]: S written, read twice; dS likewise
FORMS = {
    "PEFT": "PEFT, adapters in bf16",
    "Unsloth": "Unsloth",
    "LoRAFusion": "LoRAFusion",
    "ours": "here",
    "floor": "floor with S stored",
}


def base_cost(tokens: int, width: int, outs: tuple[int, ...]) -> Cost:
    """Forward and dX of frozen linears; well-tiled GEMMs of this size are bound by FLOPs."""
    return Cost(0.0, 4.0 * tokens * width * sum(outs))


def adapter_cost(form: str, tokens: int, width: int, outs: tuple[int, ...], rank: int) -> Cost:
    """What LoRA of one rank on each linear adds to a step, forward and backward."""
    forward, backward = PASSES[FORMS[form]]
    elements = pass_elements(forward, width, outs) + pass_elements(backward, width, outs)
    moved = BYTES * tokens * (elements + STORED_PASSES * rank * len(outs))
    return Cost(moved, 6.0 * tokens * rank * sum(width + out for out in outs))


def common_costs(shape: Shape, tokens: int) -> list[tuple[float, Cost]]:
    """(how often, cost) of what a step does beside its adapted linears."""
    sequence = min(tokens, SEQUENCE)
    # causal scores and mixing, 2 products forward and 5 backward, half of each skipped
    attention = Cost(0.0, 7.0 * tokens * sequence * shape.query)
    # two norms (2 passes forward, 3 backward), two residuals (3 passes), rotary, activation
    passes = 16 * shape.width + 4 * (shape.query + shape.kv) + 8 * shape.inner
    elementwise = Cost(BYTES * tokens * passes)
    head = Cost(0.0, 4.0 * tokens * shape.width * shape.vocabulary)
    loss = Cost(BYTES * tokens * 4 * shape.vocabulary)  # logits and their gradient
    return [(shape.layers, attention), (shape.layers, elementwise), (1, head), (1, loss)]


def project(card: Card, shape: Shape, tokens: int, rank: int) -> dict[str, dict[str, float]]:
    """Projected seconds: group or "step" -> "base" and every form (base included)."""
    found: dict[str, dict[str, float]] = {}
    for name, (width, outs) in shape.groups().items():
        base = card.seconds(base_cost(tokens, width, outs))
        found[name] = {"base": base} | {
            form: base + card.seconds(adapter_cost(form, tokens, width, outs, rank))
            for form in FORMS
        }
    common = sum(times * card.seconds(cost) for times, cost in common_costs(shape, tokens))
    layers = list(found.values())
    found["step"] = {
        form: common + shape.layers * sum(layer[form] for layer in layers)
        for form in ("base", *FORMS)
    }
    return found


def projections() -> str:
    """The assumptions and a table for each card, model and rank."""
    peaks = "; ".join(
        f"{name} SXM {card.rate / 1e12:g} TFLOP/s, {card.bandwidth / 1e12:g} TB/s"
        for name, card in CARDS.items()
    )
    parts = [
        template("roofline.md").format(
            stored=STORED_PASSES, rate=RATE_REACHED, bandwidth=BANDWIDTH_REACHED, peaks=peaks,
            tokens=TOKENS, sequence=SEQUENCE,
        )
    ]  # fmt: skip
    for (name, card), model, rank in product(CARDS.items(), MODELS, RANKS):
        lines = [
            (group, f"{seconds['base'] * 1e3:.3g}")
            + tuple(f"{s * 1e3:.3g} ({s / seconds['base'] - 1:+.0%})" for s in seconds.values())[1:]
            for group, seconds in project(card, SHAPES[model], TOKENS, rank).items()
        ]
        parts.append(f"Projection, not measured: {model} on {name} SXM, rank {rank}\n")
        parts.append(table(("projection of", "frozen base", *FORMS), lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(projections())
