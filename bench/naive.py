"""What the fast ways are compared with: prediction and disagreement as anybody would write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import adarank_fast as ada
from adarank_fast import perturbation
from adarank_fast.models.outputs import mean_pool


def across(modules: Mapping[str, str], count: int) -> dict[str, str]:
    """At most `count` of the modules, evenly through their order: all depths and kinds."""
    names = list(modules)
    return {name: modules[name] for name in names[:: max(len(names) // count, 1)][:count]}


@dataclass
class Problem:
    """A model, a batch, and the options of `predict_ranks` (targets, metric, trials at least).

    Logits are compared token by token by "tv", the mean-pooled last hidden state by "l1".
    """

    model: Any
    batch: dict[str, Tensor]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self.targets = ada.find_targets(self.model, self.options["target_modules"])
        self.modules = {target.name: target.path for target in self.targets}
        self.metric, self.trials = self.options["metric"], self.options["trials"]

    def predict(self, **options: Any) -> ada.RankPlan:
        options = {"budget": 8, "progress": False, **self.options, **options}
        return ada.predict_ranks(self.model, [self.batch], **options)

    def naive(self, modules: Mapping[str, str], precise: bool = True) -> dict[str, float]:
        """The first trial's disagreements, by the naive loop."""
        mask = "attention_mask" if self.metric == "tv" else None
        found = naive_disagreements(
            self.model, [self.batch], modules, _compared, 1, 0, mask, self.metric, precise
        )
        return {name: value for name, (value,) in found.items()}


def _compared(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    if "logits" in outputs:
        return outputs.logits
    return mean_pool(outputs.last_hidden_state, batch["attention_mask"])


@torch.no_grad()
def naive_disagreements(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    modules: Mapping[str, str],
    read: Callable[[Any, Mapping[str, Any]], Tensor],
    trials: int,
    seed: int = 0,
    mask: str | None = None,
    metric: str = "l1",
    precise: bool = True,
) -> dict[str, list[float]]:
    """Mean |f_perturbed(x) - f(x)|, or total variation, of every module and trial.

    Perturbed in place, restored after a full forward for each (module, trial, batch).

    Args:
        model: in eval mode; its weights are overwritten and restored.
        batches: keyword inputs.
        modules: canonical name -> path in `model`.
        read: (outputs, batch) -> [B, D], or [B, T, D] if `mask` names the batch's [B, T] mask.
        trials: per module.
        seed: of the noise, as `predict_ranks` draws it.
        metric: "l1" or "tv".
        precise: compare in float64, to check with; else in float32, as one would: to time.
    """
    wide = torch.float64 if precise else torch.float32

    def compared(outputs: Tensor) -> Tensor:
        return outputs.to(wide).softmax(-1) if metric == "tv" else outputs

    def distance(f: Tensor, g: Tensor) -> Tensor:
        difference = (f - g).abs()
        return difference.sum(-1) / 2 if metric == "tv" else difference.to(wide)

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    clean = [compared(read(model(**batch), batch)) for batch in batches]
    found: dict[str, list[float]] = {}
    for name, path in modules.items():
        module = model.get_submodule(path)
        before = {key: p.detach().clone() for key, p in module.named_parameters(recurse=False)}
        found[name] = []
        for trial in range(trials):
            weight_noise, bias_noise = perturbation(module, name, trial, seed)
            module.weight.add_(weight_noise)
            if bias_noise is not None:
                module.bias.add_(bias_noise)
            total, count = 0.0, 0
            for batch, reference in zip(batches, clean, strict=True):
                difference = distance(compared(read(model(**batch), batch)), reference)
                if mask is not None:
                    difference = difference[batch[mask].bool()]
                total += difference.sum().item()
                count += difference.numel()
            found[name].append(total / count)
            for key, p in module.named_parameters(recurse=False):
                p.copy_(before[key])
    torch.backends.mha.set_fastpath_enabled(fast_path)
    return found


def materialised(hidden: Tensor, weight: Tensor, metric: str) -> Tensor:
    """The disagreement [K, K] by way of all outputs, [K, N, V] in hidden's dtype; "l1" or "tv"."""
    outputs = torch.nn.functional.linear(hidden, weight)
    if metric == "tv":
        for rows in outputs:  # in place: a second [K, N, V] would be unfair
            torch.softmax(rows, -1, out=rows)
    found = torch.zeros(len(hidden), len(hidden), device=hidden.device)
    for i in range(len(hidden)):
        for j in range(i):
            sums = (outputs[i] - outputs[j]).abs_().sum(-1, dtype=torch.float32)
            value = sums.mean() / (len(weight) if metric == "l1" else 2)
            found[i, j] = found[j, i] = value
    return found
