"""A pytest plugin for PEFT's own tests: prepares each model once PEFT made or changed it.

    PEFT_SUITE=accelerated PEFT_SUITE_FOLDER=folder pytest -p prepared ...

PEFT_SUITE is what is done: "plain" nothing; "accelerated" fused layers; "graphed" fused layers,
gated MLPs that compute again, and the model's blocks, or all of it where it has none, as graphs
with a stand-in for CUDA's; "recorded" graphs of recorded operators. Each process writes the
outcomes and counts that it saw into a file of the folder.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graph_stand_in
import peft
from peft import PeftMixedModel, PeftModel
from torch import nn

import adarank_fast as ada
from adarank_fast.adapters import fused_linear, graphs
from adarank_fast.adapters.gated_mlp import gated_mlps
from adarank_fast.adapters.graph_blocks import graph_report, graph_with
from adarank_fast.adapters.groups import LayerState
from adarank_fast.models.targets import find_blocks, unwrap

HOW = os.environ.get("PEFT_SUITE", "plain")
BACKENDS = {"graphed": graph_stand_in.StandIn, "recorded": graph_stand_in.Tape}
WHOLE_MODELS = ("decoder_models", "encoder_decoder_models", "feature_extraction_models")
OF_LORA = ("LoraConfig", "AdaLoraConfig", None)

outcomes: dict[str, str] = {}
reasons: Counter[str] = Counter()  # of calls through PEFT
eager: Counter[str] = Counter()  # reasons of calls beside graphs
counts: Counter[str] = Counter()  # "swapped", "fused", "captures", "replays", "owned MLPs", ...


def prepare(model: Any) -> None:
    """Give new LoRA layers, if there are any, their fused class; graph what is not graphed."""
    if not isinstance(model, nn.Module):
        return
    classes = fused_linear.fused_classes()
    new = sum(type(module) in classes for module in model.modules())
    if new:
        before = len(list(gated_mlps(model)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # most models have no gated MLP
                ada.accelerate(model, recompute_mlp=HOW == "graphed")
        except ada.AdarankError as refusal:  # compiled models
            reasons[f"refused: {refusal}"] += 1
            return
        counts["swapped"] += new
        counts["owned MLPs"] += len(list(gated_mlps(model))) - before
    if HOW in BACKENDS:
        graph(model)


def graph(model: nn.Module) -> None:
    """Graphs of the blocks, or of the whole model."""
    try:
        graph_report(model)
        return  # it has them
    except ada.AdarankError:
        pass
    whole = "base_model.model" if isinstance(model, PeftMixedModel) else ""
    paths = find_blocks(unwrap(model))
    try:
        graph_with(model, Counted(), paths=paths or [whole])
    except ada.AdarankError as refusal:
        eager[f"refused: {refusal}"] += 1
        return
    counts["models by blocks" if paths else "models as a whole"] += 1
    for module in model.modules():
        place = module.__dict__.get("_adarank_graphs")
        if place is not None:
            place.graphs.eager = eager


class Counted(BACKENDS.get(HOW, graph_stand_in.StandIn)):  # type: ignore[misc]
    """The stand-in, with the session's counts."""

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        outputs, replay = super().capture(run)
        counts["captures"] += 1

        def counted() -> None:
            counts["replays"] += 1
            replay()

        return outputs, counted


def then_prepare(owner: Any, name: str, of_result: bool) -> None:
    """Prepare what `owner.name` returns, or the model that it is called on."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        prepare(result if of_result else args[0])
        return result

    setattr(owner, name, wrapped)


def count(state: LayerState) -> None:
    """Add a layer's calls to the session's, once."""
    counts["fused"] += state.fused
    reasons.update(state.fallbacks)
    state.fused = 0
    state.fallbacks.clear()


def copy_without_counts(state: LayerState, attributes: dict[str, Any]) -> None:
    """The calls of a copied layer stay the original's."""
    state.__dict__.update(attributes, fused=0, fallbacks=Counter())


def pytest_configure(config: Any) -> None:
    if HOW == "plain":
        return
    graphs.WARM_UP = 0  # type: ignore[misc]  # most tests call a model once or twice
    for cls in (PeftModel, PeftMixedModel):
        for name in ("__init__", "add_adapter", "load_adapter"):
            then_prepare(cls, name, of_result=False)
    for name in ("get_peft_model", "inject_adapter_in_model"):
        then_prepare(peft, name, of_result=True)
    LayerState.__del__ = count  # type: ignore[attr-defined]
    LayerState.__setstate__ = copy_without_counts  # type: ignore[attr-defined]


class EverythingSeen(dict[str, int]):
    """For PEFT's `hub_online_once`, which is offline only for models that it saw before."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Of the files that try every kind of adapter on models of transformers, those of LoRA."""
    left_out = [
        item
        for item in items
        if item.path.stem.removeprefix("test_") in WHOLE_MODELS
        and hasattr(item, "callspec")
        and getattr(item.callspec.params.get("config_cls"), "__name__", None) not in OF_LORA
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def pytest_collection_finish() -> None:
    tests = sys.modules.get("tests.testing_utils")
    if os.environ.get("HF_HUB_OFFLINE") == "1" and hasattr(tests, "_HUB_MODEL_ACCESSES"):
        tests._HUB_MODEL_ACCESSES = EverythingSeen()


def pytest_runtest_logreport(report: Any) -> None:
    """The worst of set-up, call and tear-down."""
    if report.when == "call" or report.outcome != "passed":
        if outcomes.get(report.nodeid) != "failed":
            outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session: Any) -> None:
    gc.collect()
    for thing in gc.get_objects():
        if type(thing) is LayerState:
            count(thing)
    folder = Path(os.environ["PEFT_SUITE_FOLDER"])
    controller = not hasattr(session.config, "workerinput")
    found = {
        "counts": counts,
        "reasons": reasons,
        "eager": eager,
        "outcomes": outcomes if controller else {},
    }
    (folder / f"{os.getpid()}.json").write_text(json.dumps(found), encoding="utf-8")
