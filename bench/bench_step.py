"""Training steps of whole models: the frozen base, PEFT, and adarank-fast, interleaved.

    python -m bench.bench_step                 (or `make bench-step`): all rows
    python -m bench.bench_step --slices 1      goes on where it stopped, for about a minute
    python -m bench.bench_step --compiled      MiniLM in float32 only, through torch.compile

MiniLM, MPNet-base and SmolLM2-135M from their PyPI wheels, all linears adapted at average rank 8,
512 tokens. A step is forward, loss, backward and AdamW; the frozen base's is forward, loss and the
backward pass to its embeddings, the floor of every variant. Modules are in eval mode, so that all
variants compute the same loss, which is checked, with the gradients, before any time is reported.
Results go to bench/results/step.json (compiled: step_compiled.json).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import adarank_fast as ada
from adarank_fast.demo.assets import minilm, mpnet, smollm2
from bench.results_file import write_all
from bench.slices import (
    Row,
    Slices,
    arguments,
    describe,
    kernel_sources,
    medians,
    ratio_interval,
)

FOLDERS = {"MiniLM": minilm, "MPNet-base": mpnet, "SmolLM2-135M": smollm2}
TOKENS = (4, 128)  # batch, sequence
RANK, CLASSES = 8, 6
ROWS = {
    f"{name}, {str(dtype).removeprefix('torch.')}": (name, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for name in FOLDERS
}
ADAPTERS32 = "ours, float32 adapters"


class WithLoss(nn.Module):
    """A language model's own loss, or an encoder's with a fixed head on its mean-pooled output."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.model = model
        self.causal = config.model_type == "llama"
        self.config = config
        self.head = nn.Linear(config.hidden_size, CLASSES).requires_grad_(False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        if self.causal:
            return self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        hidden = self.model(input_ids=input_ids).last_hidden_state.mean(1)
        return nn.functional.cross_entropy(self.head(hidden).float(), labels)


def load(name: str) -> WithLoss:
    torch.manual_seed(0)
    folder = FOLDERS[name]()
    loader = AutoModelForCausalLM if name.startswith("SmolLM2") else AutoModel
    model = loader.from_pretrained(folder, dtype=torch.float32)
    return WithLoss(model, model.config).requires_grad_(False).eval()


def twin(model: nn.Module) -> Any:
    """A copy that shares the frozen parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def adapted(model: WithLoss, dtype: torch.dtype, mixed: bool) -> WithLoss:
    """With PEFT's adapters in `dtype`; mixed ranks and uniform ones of equal parameters."""
    plan = ada.RankPlan.uniform(model.model, RANK, target_modules="all-linear")
    if mixed:  # a spread as predictions have it: 0.25 to 1.75 of the mean, in a scrambled order
        scores = {name: 0.25 + 1.5 * (i * 7 % 11) / 10 for i, name in enumerate(plan.ranks)}
        ranks = ada.allocate_ranks(
            scores, budget_parameters=plan.parameters, sizes=plan.sizes, min_rank=1
        )
        plan = ada.RankPlan(ranks, plan.sizes)
    model = twin(model)
    torch.manual_seed(1)
    model.model = ada.restore(ada.inject(model.model, plan))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def variants(name: str, dtype: torch.dtype, inputs: dict[str, Tensor]) -> dict[str, WithLoss]:
    model = load(name).to(dtype)
    ids = {"input_ids": inputs["input_ids"]}
    peft = adapted(model, dtype, mixed=True)
    models = {"frozen": model, "peft": peft}
    if dtype != torch.float32:
        models["peft default"] = adapted(model, torch.float32, mixed=True)
        models[ADAPTERS32] = twin(models["peft default"])
        ada.accelerate(models[ADAPTERS32].model, example=ids)
    models["ours"] = twin(peft)
    models["ours, uniform"] = adapted(model, dtype, mixed=False)
    for key in ("ours", "ours, uniform"):
        ada.accelerate(models[key].model, example=ids)
    for model in models.values():  # as enable_input_require_grads does
        embeddings = model.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda m, args, output: output.requires_grad_(True))
    return models


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step_of(
    model: WithLoss, inputs: dict[str, Tensor], forward: Callable[..., Tensor]
) -> Callable[[], None]:
    parameters = trainable(model)
    optimiser = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None

    def step() -> None:
        if optimiser is not None:
            optimiser.zero_grad(set_to_none=True)
        forward(**inputs).backward()
        if optimiser is not None:
            optimiser.step()

    return step


def check(models: dict[str, WithLoss], inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """No time is reported for a step that computes something else."""
    pairs = [("ours", "peft")] + [(ADAPTERS32, "peft default")] * (ADAPTERS32 in models)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for names in pairs:
        losses, grads = [], []
        for name in names:
            loss = models[name](**inputs)
            losses.append(loss.item())
            grads.append(torch.autograd.grad(loss, trainable(models[name])))
        if abs(losses[0] - losses[1]) > tolerance * abs(losses[1]):
            raise ArithmeticError(f"{names[0]}: loss {losses[0]}, {names[1]}: {losses[1]}")
        ours, theirs = (torch.cat([g.float().flatten() for g in some]) for some in grads)
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error <= tolerance:
            raise ArithmeticError(f"{names[0]}: gradients differ from {names[1]}'s by {error:.2g}")
        report = ada.fusion_report(models[names[0]].model)
        if report.fused_share != 1.0:
            raise ArithmeticError(f"{names[0]} is not fused everywhere: {report}")


def steps_of_row(key: str, compiled: bool = False) -> tuple[dict[str, Callable[[], None]], Row]:
    name, dtype = ROWS[key]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(5, 20_000, TOKENS, generator=generator),
        "labels": torch.randint(CLASSES, TOKENS[:1], generator=generator),
    }
    models = variants(name, dtype, inputs)
    check(models, inputs, dtype)
    steps = {
        variant: step_of(model, inputs, torch.compile(model) if compiled else model)
        for variant, model in models.items()
    }
    parameters = {v: sum(p.numel() for p in trainable(m)) for v, m in models.items()}
    return steps, {"adapter_parameters": parameters}


def figures(key: str, row: Row) -> dict[str, Any]:
    name, dtype = ROWS[key]
    middle = medians(row["seconds"])
    found = {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": TOKENS[0] * TOKENS[1],
        "average_rank": RANK,
        "repetitions": len(row["seconds"]["frozen"]),
        "adapter_parameters": row["adapter_parameters"],
        "median_seconds": middle,
        "over_frozen": {variant: value / middle["frozen"] for variant, value in middle.items()},
        "peft_step_over_ours": middle["peft"] / middle["ours"],
        "mixed_step_over_uniform": middle["ours"] / middle["ours, uniform"],
    }
    for title, ours, theirs in (
        ("overhead_over_peft", "ours", "peft"),
        ("overhead_over_peft_default", ADAPTERS32, "peft default"),
    ):
        if theirs in middle:
            ratio, low, high = ratio_interval([row], ours, theirs)
            found[title] = {"ratio": ratio, "interval": [low, high]}
    return found


def main() -> None:
    parser = arguments("Training steps of whole models.", repetitions=10)
    parser.add_argument("--compiled", action="store_true", help="MiniLM, float32, torch.compile")
    options = parser.parse_args()
    keys = ["MiniLM, float32"] if options.compiled else list(ROWS)
    name = "step_compiled" if options.compiled else "step"
    slices = Slices(name, keys, options.repetitions, [*kernel_sources(), Path(__file__)])
    left = any(slices.missing(key) > 0 for key in keys)
    done = 0
    while left and (not options.slices or done < options.slices):
        left = slices.run(lambda key: steps_of_row(key, options.compiled), options.seconds)
        done += 1
    if left:
        rows = sum(slices.missing(key) <= 0 for key in keys)
        print(f"{rows} of {len(keys)} rows finished; run again to go on")
        return
    rows = {key: figures(key, slices.rows[key]) for key in keys}
    path = write_all(name, rows)
    for key, row in rows.items():
        print(f"{key}: {describe(slices.rows[key]['seconds'])}")
        print(f"   PEFT's step / ours {row['peft_step_over_ours']:.3f}")
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
