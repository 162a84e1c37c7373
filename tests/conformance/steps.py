"""What must hold for every architecture: one small function a column of docs/compatibility.md.

A step raises AssertionError, or whatever goes wrong; what it returns is written into the table.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import adarank_fast as ada
from adarank_fast.models.forward_patching import undisturbed
from adarank_fast.models.outputs import choose_output, position_mask
from adarank_fast.models.targets import find_blocks, find_candidates
from adarank_fast.prediction.cost import estimate_cost
from adarank_fast.prediction.folding import FOLDED
from tests.conformance.case import YES, Case
from tests.conformance.numbers import (
    TOLERANCE,
    assert_same,
    assert_same_gradients,
    gradients,
    output,
)


@contextmanager
def slow_path() -> Iterator[None]:
    """torch.nn.TransformerEncoder calls its modules in eval mode too."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def targets(case: Case) -> str:
    for choice, expected in (
        ("attention", case.row.attention),
        ("all-linear", case.row.linear),
    ):
        parts, count = expected
        if not count:
            with pytest.raises(ValueError, match="attention"):
                ada.find_targets(case.base, choice)
            continue
        found = ada.find_targets(case.base, choice)
        assert {t.name.rpartition(".")[-1] for t in found} == set(parts.split()), choice
        assert len(found) == count, choice
        assert not any(t.parameter for t in found)
    return f"{case.row.attention[1]} / {case.row.linear[1]}"


def groups(case: Case) -> str:
    """What a dry run announces is what training fuses."""
    cost = estimate_cost(case.base, [case.inputs], case.names, 1, case.row.output)
    kinds = {"+".join(name.rpartition(".")[-1] for name in group) for group in cost.groups}
    assert kinds == set(case.row.groups.split())
    paths = {t.name: t.path for t in ada.find_targets(case.base, case.names)}
    announced = {tuple(f"base_model.model.{paths[n]}" for n in group) for group in cost.groups}
    report = ada.fusion_report(case.fused())
    assert {layer.group for layer in report.values() if len(layer.group) > 1} == announced
    return ", ".join(sorted(kinds)) or "none"


def predict(case: Case) -> str:
    """Scores are those of full forwards with perturbed weights, on one module of each kind."""
    plan, model = case.predicted, case.base
    assert plan.ranks.keys() == {*case.names, *case.experts}
    assert all(len(score.trials) == 2 for score in plan.scores.values())
    kinds = {(t.name.rpartition(".")[-1], plan.settings["routes"][t.name]): t for t in _all(case)}
    with undisturbed(model):
        chosen = choose_output(model, case.row.output, case.inputs)
        root = model.get_submodule(chosen.root)
        inputs = {**case.inputs, **({"use_cache": False} if hasattr(model, "config") else {})}

        def value(**parameters: Tensor) -> Tensor:
            inside = f"{chosen.root}." if chosen.root else ""
            local = {name.removeprefix(inside): p for name, p in parameters.items()}
            found = chosen.read(functional_call(root, local, kwargs=inputs), case.inputs)
            mask = position_mask(model, case.inputs)
            return found[mask.bool()] if mask is not None and found.dim() > 2 else found

        clean = value()
        for target in kinds.values():
            weight, bias = _noise(target)
            parameters = {target.weight_path: target.weight + weight}
            if bias is not None:
                parameters[f"{target.path}.bias"] = target.bias + bias
            expected = (value(**parameters) - clean).abs().double().mean().item()
            assert plan.scores[target.name].trials[0] == pytest.approx(expected, rel=1e-4)
    return YES


def routes(case: Case) -> str:
    """All folded but those that the row names, so that none is slow without a reason."""
    routes = case.predicted.settings["routes"]
    slow = {name.rpartition(".")[-1] for name, route in routes.items() if route != FOLDED}
    assert slow == {*case.row.one_by_one.split(), *case.row.experts.split()}
    counts = Counter("folded" if route == FOLDED else "one by one" for route in routes.values())
    return ", ".join(f"{counts[kind]} {kind}" for kind in ("folded", "one by one") if counts[kind])


def inject(case: Case) -> str:
    """The planned ranks, counted in parameters; and nothing changes while B is zero."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.nn.TransformerEncoderLayer ignores")
        model = ada.inject(copy.deepcopy(case.base), case.plan)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == case.plan.parameters
    assert_same(output(model, case.inputs), output(case.base, case.inputs))
    return f"{len(case.names)} + {len(case.experts)} experts" if case.experts else YES


def train(case: Case) -> str:
    """Two steps, gradients equal to plain PEFT's."""
    fused = case.fused()
    plain = case.plain(fused)
    for _ in range(2):
        found, expected = (gradients(model, case.inputs) for model in (fused, plain))
        assert_same_gradients(found, expected)
        scale = max(gradient.abs().max().item() for gradient in expected.values())
        for model in (fused, plain):
            torch.optim.SGD(
                [p for p in model.parameters() if p.requires_grad], lr=0.01 / scale
            ).step()
    return YES


def fused_share(case: Case) -> str:
    """Training and inference; PEFT made no `lora.Linear` that is not fused or never called."""
    model = case.fused()
    gradients(model, case.inputs)
    output(model, case.inputs)
    report = ada.fusion_report(model)
    assert not any(type(module) is lora.Linear for module in model.modules())
    calls = {path: layer.fused_calls + layer.fallback_calls for path, layer in report.items()}
    for target in _all(case):
        if not target.parameter and case.predicted.scores[target.name].mean:
            assert calls[f"base_model.model.{target.path}"] >= 2, target.path
    assert report.fused_share >= 0.95, str(report)
    return f"{100 * report.fused_share:.0f}%"


def save(case: Case) -> str:
    model = case.fused()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(case.base), folder)
    expected = output(model, case.inputs)
    assert (expected - output(case.base, case.inputs)).abs().max() > 1e-3
    assert_same(output(loaded, case.inputs), expected)
    return YES


def disable(case: Case) -> str:
    model = case.fused()
    with model.disable_adapter():
        assert_same(output(model, case.inputs), output(case.base, case.inputs))
    return YES


def merge(case: Case) -> str:
    model = case.fused()
    before = output(model, case.inputs)
    model.merge_adapter()
    assert_same(output(model, case.inputs), before, 1e-4)
    model.unmerge_adapter()
    assert_same(output(model, case.inputs), before, 1e-4)
    return YES


def merge_and_unload(case: Case) -> str:
    model = case.fused()
    before = output(model, case.inputs)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    assert_same(output(merged, case.inputs), before, 1e-4)
    return YES


def deepcopy(case: Case) -> str:
    model = case.fused()
    before = output(model, case.inputs)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_same(output(twin, case.inputs), before)
    return YES


def state_dict(case: Case) -> str:
    """PEFT's keys; another model that loads them gives the same."""
    model, other = case.fused(), case.fused()
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    assert model.state_dict().keys() == case.plain(model).state_dict().keys()
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, case.inputs), output(model, case.inputs))
    return YES


def export(case: Case) -> str:
    """One rank for all, scales folded in: plain PEFT gives the same outputs with it."""
    model = case.fused()
    with tempfile.TemporaryDirectory() as folder:
        if case.experts:
            with pytest.raises(ValueError, match="parameters that belong to no module"):
                ada.export_uniform(model, folder)
            return "refused: experts"
        ada.export_uniform(model, folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(case.base), folder)
    assert {layer.r["default"] for layer in _layers(loaded)} == {8}
    assert {layer.scaling["default"] for layer in _layers(loaded)} == {1.0}
    assert_same(output(loaded, case.inputs), output(model, case.inputs))
    return YES


def compiled(case: Case, backend: str = "aot_eager", tolerance: float = TOLERANCE) -> str:
    """The first block of every tower, or the model where it has none."""
    model = case.fused()
    expected = gradients(model, case.inputs)
    base = model.get_base_model()
    first = {path.rpartition(".")[0]: path for path in reversed(find_blocks(base))}
    torch._dynamo.reset()
    for path in first.values():
        base.get_submodule(path).compile(backend=backend)
    try:
        assert_same_gradients(gradients(model, case.inputs), expected, tolerance)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    finally:
        torch._dynamo.reset()
    return YES


def checkpointing(case: Case) -> str:
    """Of both kinds; around each block by hand where the model does not offer it."""
    offered = getattr(case.base, "supports_gradient_checkpointing", False)
    for reentrant in (False, True):
        model = case.fused()
        before = _calls(model)
        expected = gradients(model, case.inputs)
        after = _calls(model)
        if offered:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        else:
            _checkpoint_blocks(model.get_base_model(), reentrant)
        for _ in range(2):  # the second forward may run in groups
            assert_same_gradients(gradients(model, case.inputs), expected)
        assert _calls(model) - after > 2 * 1.4 * (after - before)  # 2 * 2, or it stopped early
        assert ada.fusion_report(model).fused_share >= 0.95
    return YES if offered else "by hand"


def _checkpoint_blocks(model: nn.Module, reentrant: bool) -> None:
    for path in find_blocks(model):
        block = model.get_submodule(path)

        def forward(
            x: Tensor, *args: Any, original: Callable[..., Any] = block.forward, **kwargs: Any
        ) -> Any:
            x = x if x.requires_grad else x.detach().requires_grad_()
            run = partial(original, **kwargs)
            return checkpoint(run, x, *args, use_reentrant=reentrant)

        block.forward = forward


def _calls(model: PeftModel) -> int:
    return sum(layer.fused_calls for layer in ada.fusion_report(model).values())


def others(case: Case) -> str:
    """Embeddings of tokens and convolutions get PEFT's own adapters, and the report says why."""
    found = []
    linear = next(t.path for t in _all(case) if not t.parameter)
    for kind in (nn.Embedding, nn.Conv1d, nn.Conv2d):
        paths = [
            path
            for path, module in case.base.named_modules()
            if isinstance(module, kind)
            and getattr(module, "groups", 1) == 1
            and "position" not in path  # read by index or as a whole, as PEFT's layers are not
        ]
        if not paths:
            continue
        config = LoraConfig(r=2, target_modules=[*paths, linear], init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = get_peft_model(copy.deepcopy(case.base), config)
            model = ada.accelerate(copy.deepcopy(plain))
        report = ada.fusion_report(model)
        for path in paths:
            layer = report[f"base_model.model.{path}"]
            assert not layer.fused and f"lora.{kind.__name__}" in next(iter(layer.reasons))
        try:
            expected = output(plain, case.inputs)
        except AttributeError:  # a model that reads attributes of its convolution
            found.append(f"{kind.__name__} (fails in PEFT itself)")
            continue
        assert_same(output(model, case.inputs), expected, 1e-4)  # large random adapters
        found.append(kind.__name__)
    return ", ".join(found) or "none"


def _layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _all(case: Case) -> list[ada.Target]:
    wanted = {*case.names, *case.experts}
    return [target for target in find_candidates(case.base) if target.name in wanted]


def _noise(target: ada.Target) -> tuple[Tensor, Tensor | None]:
    return ada.perturbation(target.module, target.name, 0)


STEPS: dict[str, Callable[[Case], str]] = {
    "attention / all linear": targets,
    "groups": groups,
    "predict": predict,
    "route": routes,
    "inject": inject,
    "train": train,
    "fused calls": fused_share,
    "save, load": save,
    "disable": disable,
    "merge, unmerge": merge,
    "merge_and_unload": merge_and_unload,
    "deepcopy": deepcopy,
    "state_dict": state_dict,
    "export": export,
    "compile": compiled,
    "checkpointing": checkpointing,
    "plain PEFT": others,
}
