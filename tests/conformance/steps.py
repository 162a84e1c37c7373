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
from functools import cached_property, partial
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
from adarank_fast.prediction.recording import FOLDED
from tests.conformance.architectures import Architecture
from tests.conformance.numbers import (
    TOLERANCE,
    assert_same,
    assert_same_gradients,
    gradients,
    output,
)
from tests.tiny_models import spread

RANKS = (3, 1, 5, 2, 8)
YES = "yes"


class Subject:
    """An architecture's model, with what several steps need of it, made once.

    Attributes:
        base: the model without adapters; steps leave it alone.
        inputs: its batch.
        targets: every linear module and expert parameter that gets an adapter.
    """

    def __init__(self, architecture: Architecture) -> None:
        torch.manual_seed(0)
        self.row = architecture
        model = architecture.build()
        self.base = model.eval() if architecture.pretrained else spread(model)
        self.inputs = architecture.batch()
        self.names = [target.name for target in ada.find_targets(self.base, "all-linear")]
        parts = architecture.experts.split()
        self.experts = [t.name for t in ada.find_targets(self.base, parts)] if parts else []
        sizes = {
            t.name: (t.in_features, t.out_features)
            for t in ada.find_targets(self.base, self.names + self.experts)
        }
        ranks = {name: RANKS[i % len(RANKS)] for i, name in enumerate(sizes)}
        self.plan = ada.RankPlan(ranks, sizes)

    @cached_property
    def predicted(self) -> ada.RankPlan:
        """Two trials on every target."""
        return ada.predict_ranks(
            self.base,
            [self.inputs],
            average_rank=3,
            target_modules=self.names + self.experts,
            output=self.row.output,
            trials=2,
            progress=False,
        )

    def fused(self) -> PeftModel:
        """A fresh copy with fused adapters of mixed ranks, B not zero."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.nn.TransformerEncoderLayer passes by")
            model = ada.inject(copy.deepcopy(self.base), self.plan, example=self.inputs)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(noise, non_blocking=False).mul_(0.05)
        return model

    def plain(self, fused: PeftModel) -> PeftModel:
        """PEFT's own model with the same adapters."""
        config = copy.deepcopy(fused.peft_config["default"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            model = get_peft_model(copy.deepcopy(self.base), config)
        model.load_state_dict(fused.state_dict())
        return model


@contextmanager
def slow_path() -> Iterator[None]:
    """torch.nn.TransformerEncoder calls its modules in eval mode too."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def targets(subject: Subject) -> str:
    for choice, expected in (
        ("attention", subject.row.attention),
        ("all-linear", subject.row.linear),
    ):
        parts, count = expected
        if not count:
            with pytest.raises(ValueError, match="attention"):
                ada.find_targets(subject.base, choice)
            continue
        found = ada.find_targets(subject.base, choice)
        assert {t.name.rpartition(".")[-1] for t in found} == set(parts.split()), choice
        assert len(found) == count, choice
        assert not any(t.parameter for t in found)
    return f"{subject.row.attention[1]} / {subject.row.linear[1]}"


def groups(subject: Subject) -> str:
    """What a dry run announces is what training fuses."""
    cost = estimate_cost(subject.base, [subject.inputs], subject.names, 1, subject.row.output)
    kinds = {"+".join(name.rpartition(".")[-1] for name in group) for group in cost.groups}
    assert kinds == set(subject.row.groups.split())
    paths = {t.name: t.path for t in ada.find_targets(subject.base, subject.names)}
    announced = {tuple(f"base_model.model.{paths[n]}" for n in group) for group in cost.groups}
    report = ada.fusion_report(subject.fused())
    assert {layer.group for layer in report.values() if len(layer.group) > 1} == announced
    return ", ".join(sorted(kinds)) or "none"


def predict(subject: Subject) -> str:
    """Scores are those of full forwards with perturbed weights, on one module of each kind."""
    plan, model = subject.predicted, subject.base
    assert plan.ranks.keys() == {*subject.names, *subject.experts}
    assert all(len(score.trials) == 2 for score in plan.scores.values())
    kinds = {
        (t.name.rpartition(".")[-1], plan.settings["routes"][t.name]): t for t in _all(subject)
    }
    with undisturbed(model):
        chosen = choose_output(model, subject.row.output, subject.inputs)
        root = model.get_submodule(chosen.root)
        inputs = {**subject.inputs, **({"use_cache": False} if hasattr(model, "config") else {})}

        def value(**parameters: Tensor) -> Tensor:
            inside = f"{chosen.root}." if chosen.root else ""
            local = {name.removeprefix(inside): p for name, p in parameters.items()}
            found = chosen.read(functional_call(root, local, kwargs=inputs), subject.inputs)
            mask = position_mask(model, subject.inputs)
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


def routes(subject: Subject) -> str:
    """All folded but those that the row names, so that none is slow without a reason."""
    routes = subject.predicted.settings["routes"]
    slow = {name.rpartition(".")[-1] for name, route in routes.items() if route != FOLDED}
    assert slow == {*subject.row.one_by_one.split(), *subject.row.experts.split()}
    counts = Counter("folded" if route == FOLDED else "one by one" for route in routes.values())
    return ", ".join(f"{counts[kind]} {kind}" for kind in ("folded", "one by one") if counts[kind])


def inject(subject: Subject) -> str:
    """The planned ranks, counted in parameters; and nothing changes while B is zero."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.nn.TransformerEncoderLayer passes by")
        model = ada.inject(copy.deepcopy(subject.base), subject.plan)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == subject.plan.parameters
    assert_same(output(model, subject.inputs), output(subject.base, subject.inputs))
    return f"{len(subject.names)} + {len(subject.experts)} experts" if subject.experts else YES


def train(subject: Subject) -> str:
    """Two steps, gradients equal to plain PEFT's."""
    fused = subject.fused()
    plain = subject.plain(fused)
    for _ in range(2):
        found, expected = (gradients(model, subject.inputs) for model in (fused, plain))
        assert_same_gradients(found, expected)
        scale = max(gradient.abs().max().item() for gradient in expected.values())
        for model in (fused, plain):
            torch.optim.SGD(
                [p for p in model.parameters() if p.requires_grad], lr=0.01 / scale
            ).step()
    return YES


def fused_share(subject: Subject) -> str:
    """Training and inference; PEFT made no `lora.Linear` that is not fused or never called."""
    model = subject.fused()
    gradients(model, subject.inputs)
    output(model, subject.inputs)
    report = ada.fusion_report(model)
    assert not any(type(module) is lora.Linear for module in model.modules())
    calls = {path: layer.fused_calls + layer.fallback_calls for path, layer in report.items()}
    for target in _all(subject):
        if not target.parameter and subject.predicted.scores[target.name].mean:
            assert calls[f"base_model.model.{target.path}"] >= 2, target.path
    assert report.fused_share >= 0.95, str(report)
    return f"{100 * report.fused_share:.0f}%"


def save(subject: Subject) -> str:
    model = subject.fused()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(subject.base), folder)
    expected = output(model, subject.inputs)
    assert (expected - output(subject.base, subject.inputs)).abs().max() > 1e-3
    assert_same(output(loaded, subject.inputs), expected)
    return YES


def disable(subject: Subject) -> str:
    model = subject.fused()
    with model.disable_adapter():
        assert_same(output(model, subject.inputs), output(subject.base, subject.inputs))
    return YES


def merge(subject: Subject) -> str:
    model = subject.fused()
    before = output(model, subject.inputs)
    model.merge_adapter()
    assert_same(output(model, subject.inputs), before, 1e-4)
    model.unmerge_adapter()
    assert_same(output(model, subject.inputs), before, 1e-4)
    return YES


def merge_and_unload(subject: Subject) -> str:
    model = subject.fused()
    before = output(model, subject.inputs)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    assert_same(output(merged, subject.inputs), before, 1e-4)
    return YES


def deepcopy(subject: Subject) -> str:
    model = subject.fused()
    before = output(model, subject.inputs)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_same(output(twin, subject.inputs), before)
    return YES


def state_dict(subject: Subject) -> str:
    """PEFT's keys; another model that loads them gives the same."""
    model, other = subject.fused(), subject.fused()
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    assert model.state_dict().keys() == subject.plain(model).state_dict().keys()
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, subject.inputs), output(model, subject.inputs))
    return YES


def export(subject: Subject) -> str:
    """One rank for all, scales folded in: plain PEFT gives the same outputs with it."""
    model = subject.fused()
    with tempfile.TemporaryDirectory() as folder:
        if subject.experts:
            with pytest.raises(ValueError, match="parameters that belong to no module"):
                ada.export_uniform(model, folder)
            return "refused: experts"
        ada.export_uniform(model, folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(subject.base), folder)
    assert {layer.r["default"] for layer in _layers(loaded)} == {8}
    assert {layer.scaling["default"] for layer in _layers(loaded)} == {1.0}
    assert_same(output(loaded, subject.inputs), output(model, subject.inputs))
    return YES


def compiled(subject: Subject, backend: str = "aot_eager", tolerance: float = TOLERANCE) -> str:
    """The first block of every tower, or the model where it has none."""
    model = subject.fused()
    expected = gradients(model, subject.inputs)
    base = model.get_base_model()
    first = {path.rpartition(".")[0]: path for path in reversed(find_blocks(base))}
    torch._dynamo.reset()
    for path in first.values():
        base.get_submodule(path).compile(backend=backend)
    try:
        assert_same_gradients(gradients(model, subject.inputs), expected, tolerance)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    finally:
        torch._dynamo.reset()
    return YES


def checkpointing(subject: Subject) -> str:
    """Of both kinds; around each block by hand where the model does not offer it."""
    offered = getattr(subject.base, "supports_gradient_checkpointing", False)
    for reentrant in (False, True):
        model = subject.fused()
        before = _calls(model)
        expected = gradients(model, subject.inputs)
        after = _calls(model)
        if offered:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        else:
            _checkpoint_blocks(model.get_base_model(), reentrant)
        for _ in range(2):  # the second forward may run in groups
            assert_same_gradients(gradients(model, subject.inputs), expected)
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


def others(subject: Subject) -> str:
    """Embeddings of tokens and convolutions get PEFT's own adapters, and the report says why."""
    found = []
    linear = next(t.path for t in _all(subject) if not t.parameter)
    for kind in (nn.Embedding, nn.Conv1d, nn.Conv2d):
        paths = [
            path
            for path, module in subject.base.named_modules()
            if isinstance(module, kind)
            and getattr(module, "groups", 1) == 1
            and "position" not in path  # read by index or as a whole, as PEFT's layers are not
        ]
        if not paths:
            continue
        config = LoraConfig(r=2, target_modules=[*paths, linear], init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = get_peft_model(copy.deepcopy(subject.base), config)
            model = ada.accelerate(copy.deepcopy(plain))
        report = ada.fusion_report(model)
        for path in paths:
            layer = report[f"base_model.model.{path}"]
            assert not layer.fused and f"lora.{kind.__name__}" in next(iter(layer.reasons))
        try:
            expected = output(plain, subject.inputs)
        except AttributeError:  # a model that reads attributes of its convolution
            found.append(f"{kind.__name__} (fails in PEFT itself)")
            continue
        assert_same(output(model, subject.inputs), expected, 1e-4)  # large random adapters
        found.append(kind.__name__)
    return ", ".join(found) or "none"


def _layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _all(subject: Subject) -> list[ada.Target]:
    wanted = {*subject.names, *subject.experts}
    return [target for target in find_candidates(subject.base) if target.name in wanted]


def _noise(target: ada.Target) -> tuple[Tensor, Tensor | None]:
    return ada.perturbation(target.module, target.name, 0)


STEPS: dict[str, Callable[[Subject], str]] = {
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
