"""What the published notebook's procedure measures, beside the exact one.

    python -m bench.accumulating    writes bench/results/accumulating.json, docs/accumulating.png

The notebook means to restore a module after each trial, but restores it from the perturbed module:
nothing is undone, and the noise of a trial stays for all later trials and modules. Here a copy of
the model goes through that on purpose, one module type after the other, each from a clean copy,
layers from the first to the last. Both procedures see the same questions, the same noise matrices E
and the same output, the mean-pooled last hidden state. Two readings of std(W) are measured: of the
weight as the checkpoint has it, and of the weight as the trials before left it.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import adarank_fast as ada
from adarank_fast.demo.assets import minilm, mpnet, trec
from adarank_fast.models.outputs import mean_pool
from adarank_fast.plots.plans import arrange
from adarank_fast.plots.style import clean, line_style, new_figure, write
from adarank_fast.prediction.noise import noise_key
from adarank_kernels import philox_normal
from bench.pages import DOCS
from bench.results_file import Row, write_results

MODELS = {"MiniLM": (minilm, 16, 5), "MPNet-base": (mpnet, 8, 3)}  # questions, trials
SEED = 0
PROCEDURES = {
    "exact": "every trial from the clean model",
    "accumulating": "noise stays, std(W) of the checkpoint",
    "compounding": "noise stays, std(W) as it stands",
}


@torch.no_grad()
def accumulated(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    modules: Mapping[str, str],
    trials: int,
    current_std: bool,
) -> dict[str, float]:
    """Mean |f_perturbed(x) - f(x)| of each module when no perturbation is ever undone.

    Args:
        model: is copied.
        batch: keyword inputs.
        modules: canonical name -> path, in the order in which they are perturbed.
        trials: per module.
        current_std: scale E with the standard deviation of the weight as it stands.
    """
    model = copy.deepcopy(model).eval()

    def output() -> Tensor:
        return mean_pool(model(**batch).last_hidden_state, batch["attention_mask"])

    clean, found = output(), {}
    for name, path in modules.items():
        parameters = dict(model.get_submodule(path).named_parameters(recurse=False))
        stds = {part: _std(p) for part, p in parameters.items()}
        values = []
        for trial in range(trials):
            for part, p in parameters.items():
                noise = philox_normal(p.shape, noise_key(SEED, name, part, trial))
                p.add_(noise, alpha=_std(p) if current_std else stds[part])
            values.append((output() - clean).abs().double().mean().item())
        found[name] = statistics.fmean(values)
    return found


def _std(parameter: Tensor) -> float:
    return parameter.double().std(correction=0).item()


def measure(name: str) -> dict[str, Any]:
    """Scores and ranks by procedure, module type and layer."""
    source, questions, trials = MODELS[name]
    model = AutoModel.from_pretrained(source()).eval()
    tokenizer = AutoTokenizer.from_pretrained(source())
    texts = [text for text, _ in trec()[0][:questions]]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    plan = ada.predict_ranks(model, [batch], 8, trials=trials, seed=SEED, progress=False)
    paths = {t.name: t.path for t in ada.find_targets(model, "attention")}
    types: dict[str, list[str]] = {}
    for module, (_, label) in arrange(plan.ranks).items():
        types.setdefault(label, []).append(module)
    scores = {"exact": {module: score.mean for module, score in plan.scores.items()}}
    for procedure in ("accumulating", "compounding"):
        scores[procedure] = {}
        for members in types.values():  # each type from a clean model
            modules = {member: paths[member] for member in members}
            current = procedure == "compounding"
            scores[procedure] |= accumulated(model, batch, modules, trials, current)
    ranks = {p: ada.allocate_ranks(found, 8, sizes=plan.sizes) for p, found in scores.items()}

    def by_type(found: Mapping[str, Any]) -> dict[str, list[Any]]:
        return {t: [found[m] for m in members] for t, members in types.items()}

    exact = ranks["exact"]
    return {
        "questions": questions,
        "trials": trials,
        "seed": SEED,
        "scores": {procedure: by_type(found) for procedure, found in scores.items()},
        "ranks": {procedure: by_type(found) for procedure, found in ranks.items()},
        "changed_ranks": {
            p: sum(r[m] != exact[m] for m in exact) for p, r in ranks.items() if p != "exact"
        },
    }


def draw(rows: Mapping[str, Row], path: Path) -> None:
    """Disagreement by layer: a row of axes a model, a column a procedure, a line a module type."""
    figure = new_figure(11, 3.3 * len(rows))
    grid = figure.subplots(len(rows), len(PROCEDURES), squeeze=False)
    for line, (name, row) in zip(grid, rows.items(), strict=True):
        for axes, (procedure, title) in zip(line, PROCEDURES.items(), strict=True):
            for index, (label, values) in enumerate(row["scores"][procedure].items()):
                axes.plot(range(len(values)), values, label=label, **line_style(index))
            axes.set_title(f"{name}: {title}", fontsize=8, loc="left")
            axes.set_xlabel("layer")
            axes.set_ylim(bottom=0)
            clean(axes)
        line[0].set_ylabel("disagreement")
        line[0].legend(frameon=False, fontsize=8)
    write(figure, path)


if __name__ == "__main__":
    found = {name: measure(name) for name in MODELS}
    for name, row in found.items():
        print(f"{name}: ranks that differ from the exact ones: {row['changed_ranks']}")
    write_results("accumulating", found)
    draw(found, DOCS / "accumulating.png")
