"""Projected times of LoRA steps on GPUs that nobody measured here: bytes and FLOPs over peak rates.

    python bench/roofline.py                          (or `make roofline`)
    python bench/roofline.py --card H100 --model Llama-3-8B --rank 16 --json

Every figure is a projection; `python -m bench.gpu` measures. Needs no GPU and no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.counts import PASSES, SHAPES, Cost, Shape, pass_elements


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

ASSUMPTIONS = f"""Everything below is a projection: counted, not measured. Formula, per group of linears that share X:
  base     = 4 tokens in sum(out) / F                      forward and dX of the frozen weights
  adapters = max(bytes / B, 6 tokens sum(r (in + out)) / F)
  bytes    = 2 tokens (passes(X, Y) + {STORED_PASSES} sum(r)), passes as in docs/kernels.md
  step     = layers sum(base + adapters) + common
  common   = attention, head, norms, residuals, rotary, activation, loss: the same for everyone
  F = {RATE_REACHED:.0%} of the peak dense bfloat16 rate, B = {BANDWIDTH_REACHED:.0%} of the peak bandwidth
Peaks (data sheets): {"; ".join(f"{name} SXM {card.rate / 1e12:g} TFLOP/s, {card.bandwidth / 1e12:g} TB/s" for name, card in CARDS.items())}.
Assumed: bfloat16 throughout, the same rank on every linear, no dropout, no recomputation, launches
hidden, sequences of {SEQUENCE}, flash attention; parameters, their gradients and the optimizer's step
are not counted. Fused GEMMs (LoRAFusion's too) are taken to be as fast as the vendor's, which is the open
question.
"""  # noqa: E501


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


def table(title: str, found: dict[str, dict[str, float]]) -> Table:
    drawn = Table(title=f"Projection, not measured: {title}")
    drawn.add_column("projection of")
    drawn.add_column("frozen base\nprojection, ms", justify="right")
    for form in FORMS:
        drawn.add_column(f"{form}\nprojection, ms\n(over base)", justify="right")
    for name, seconds in found.items():
        if name == "step":
            drawn.add_section()
        cells = [
            f"{seconds[form] * 1e3:.3g} ({seconds[form] / seconds['base'] - 1:+.0%})"
            for form in FORMS
        ]
        drawn.add_row(name, f"{seconds['base'] * 1e3:.3g}", *cells)
    return drawn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="roofline", description="Projected times of LoRA steps; nothing measured.")
    parser.add_argument("--card", choices=CARDS, help="all, unless given")
    parser.add_argument("--model", choices=MODELS, help="all, unless given")
    parser.add_argument("--rank", type=positive, help=f"{RANKS}, unless given")
    parser.add_argument("--tokens", type=positive, default=8192, help="a step (8192)")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows: list[dict[str, Any]] = []
    if not options.json:
        console.print(ASSUMPTIONS, highlight=False, markup=False, soft_wrap=True)
    for name in [options.card] if options.card else CARDS:
        for model in [options.model] if options.model else MODELS:
            for rank in [options.rank] if options.rank else RANKS:
                found = project(CARDS[name], SHAPES[model], options.tokens, rank)
                said = {"card": name, "model": model, "rank": rank, "tokens": options.tokens}
                rows.append(said | {"projected_seconds": found})
                if not options.json:
                    title = f"{model} on {name} SXM, rank {rank}, {options.tokens:,} tokens"
                    console.print(table(title, found))
    if options.json:
        print(json.dumps({"projection": True, "assumptions": ASSUMPTIONS, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
