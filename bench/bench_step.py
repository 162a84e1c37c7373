"""Training steps of whole models: the frozen base, PEFT, and adarank-fast, interleaved.

    python -m bench.bench_step                 (or `make bench-step`): all rows
    python -m bench.bench_step --slices 1      goes on where it stopped, for about a minute
    python -m bench.bench_step --only tiny --repetitions 300    kept for the run that writes all
    python -m bench.bench_step --compiled      MiniLM in float32 only, through torch.compile

Llamas of a few layers; MiniLM, MPNet-base and SmolLM2-135M from their PyPI wheels, 512 tokens; all
linears adapted at average rank 8. A step is forward, loss, backward and AdamW; the frozen base's is
forward, loss and the backward pass to its embeddings, the floor of every variant. Or it generates
tokens. All variants compute the same loss in eval mode, which is checked, with the gradients,
before any time is reported; only rows with dropout are timed in training mode.
Results go to bench/results/step.json (compiled: step_compiled.json).
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import adarank_fast as ada
from adarank_fast.benchmarking.arms import step_of, trainable
from adarank_fast.benchmarking.measure import Step, medians, overhead_ratio
from adarank_fast.demo.assets import minilm, mpnet, smollm2
from bench.blocks import ADAPTERS32, DTYPES, check, trained_a_little, variants, with_scores
from bench.slices import Row, Slices, arguments

FOLDERS = {"MiniLM": minilm, "MPNet-base": mpnet, "SmolLM2-135M": smollm2}
RANK, CLASSES, PROMPT, NEW = 8, 6, 128, 16


class Case(NamedTuple):
    """What a row runs: a model from its wheel, or a Llama of so many layers."""

    name: str
    dtype: torch.dtype
    layers: int = 0
    tokens: tuple[int, int] = (4, 128)  # batch, sequence
    width: int = 576
    generates: bool = False
    dropout: float = 0.0


def cases() -> dict[str, Case]:
    rows = {}
    for name, dtype in DTYPES.items():
        for layers, tokens in ((4, 1024), (8, 512)):
            title = f"Llama, {layers} layers, {tokens} tokens, {name}"
            rows[title] = Case("Llama", dtype, layers, (4, tokens // 4))
        rows[f"Llama, 4 layers, generation, {name}"] = Case(
            "Llama", dtype, 4, (1, PROMPT), 576, True
        )
        for dropout in (0.0, 0.1):
            title = f"Llama, tiny, dropout {dropout:g}, {name}"
            rows[title] = Case("Llama", dtype, 2, (1, 4), 32, False, dropout)
        rows |= {f"{model}, {name}": Case(model, dtype) for model in FOLDERS}
    return rows


ROWS = cases()


class WithLoss(nn.Module):
    """A language model's own loss, or an encoder's with a fixed head on its mean-pooled output."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.causal = case.name in ("Llama", "SmolLM2-135M")
        if case.layers:
            self.model: Any = llama(case.layers, case.width)
        else:
            loader = AutoModelForCausalLM if self.causal else AutoModel
            self.model = loader.from_pretrained(FOLDERS[case.name](), dtype=torch.float32)
        self.head = nn.Linear(self.model.config.hidden_size, CLASSES)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        if self.causal:
            return self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        hidden = self.model(input_ids=input_ids).last_hidden_state.mean(1)
        return nn.functional.cross_entropy(self.head(hidden).float(), labels)


def llama(layers: int, width: int) -> nn.Module:
    """SmolLM2-135M's layers, or two heads of 16; a small head."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    if width == 32:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=1024, **heads)
    return LlamaForCausalLM(config)


def copied(model: nn.Module) -> Any:
    """A copy that shares the frozen parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def adapted(model: WithLoss, dtype: torch.dtype, mixed: bool, dropout: float) -> nn.Module:
    """With PEFT's adapters in `dtype`; mixed ranks and uniform ones of equal parameters."""
    plan = ada.RankPlan.uniform(
        model.model, min(RANK, model.head.in_features // 4), target_modules="all-linear"
    )
    if mixed:  # a spread as predictions have it: 0.25 to 1.75 of the mean, in a scrambled order
        scores = {name: 0.25 + 1.5 * (i * 7 % 11) / 10 for i, name in enumerate(plan.ranks)}
        plan = with_scores(plan, scores, min_rank=1)
    model = copied(model)
    torch.manual_seed(1)
    model.model = ada.restore(ada.inject(model.model, plan, lora_dropout=dropout))
    for parameter in trainable(model):
        parameter.data = parameter.data.to(dtype)
    return trained_a_little(model).eval()


def generation_of(model: nn.Module, input_ids: Tensor) -> Step:
    language_model: Any = model.model

    def step() -> None:
        language_model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, pad_token_id=0,
            min_new_tokens=NEW, max_new_tokens=NEW,
        )  # fmt: skip

    return step


def steps_of_row(key: str, compiled: bool = False) -> tuple[dict[str, Step], Row]:
    """The row's steps, checked, and what is not timed."""
    case = ROWS[key]
    dtype = case.dtype
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1_000 if case.layers else 20_000, case.tokens, generator=generator)
    labels = torch.randint(CLASSES, case.tokens[:1], generator=generator)
    inputs = {"input_ids": ids, "labels": labels}
    torch.manual_seed(0)
    base = WithLoss(case).requires_grad_(False).eval().to(dtype)

    def fused(model: nn.Module) -> nn.Module:
        model = copied(model)
        ada.accelerate(model.model, example={"input_ids": ids})
        return model

    def make(adapters: torch.dtype, mixed: bool) -> nn.Module:
        return adapted(base, adapters, mixed, case.dropout)

    models = variants(base, make, fused, dtype)
    if case.layers:
        del models["ours, uniform"]
    for model in models.values():  # as enable_input_require_grads does
        embeddings = model.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda m, args, output: output.requires_grad_(True))

    def computed(model: nn.Module) -> list[Tensor]:
        loss = model(**inputs)
        gradients = torch.autograd.grad(loss, trainable(model))
        return [loss.detach(), torch.cat([g.float().flatten() for g in gradients])]

    check(models, computed, tolerance=1e-4 if dtype == torch.float32 else 5e-2)
    steps = {}
    for variant, model in models.items():
        model.train(case.dropout > 0)
        forward = torch.compile(model) if compiled else model
        steps[variant] = step_of(model, inputs, partial(forward, **inputs))
        if case.generates:
            steps[variant] = generation_of(model, ids)
    return steps, {"adapter_parameters": sum(p.numel() for p in trainable(models["ours"]))}


def figures(row: Row) -> dict[str, Any]:
    """One row of the results; times are medians in seconds."""
    middle = medians(row["seconds"])
    found = {
        "repetitions": len(row["seconds"]["frozen"]),
        "adapter_parameters": row["adapter_parameters"],
        "median_seconds": middle,
        "over_frozen": {variant: value / middle["frozen"] for variant, value in middle.items()},
        "overhead_over_peft": overhead_ratio([row], "ours", "peft"),
    }
    if "ours, uniform" in middle:
        found["mixed_step_over_uniform"] = middle["ours"] / middle["ours, uniform"]
    if ADAPTERS32 in middle:
        found["overhead_over_peft_default"] = overhead_ratio([row], ADAPTERS32, "peft default")
    return found


def main() -> None:
    parser = arguments("Training steps of whole models.", repetitions=10)
    parser.add_argument("--compiled", action="store_true", help="MiniLM, float32, torch.compile")
    options = parser.parse_args()
    Slices("step_compiled" if options.compiled else "step", __file__, options).finish(
        ["MiniLM, float32"] if options.compiled else ROWS,
        partial(steps_of_row, compiled=options.compiled),
        lambda rows: {key: figures(row) for key, row in rows.items()},
    )


if __name__ == "__main__":
    main()
