"""A pytest plugin for PEFT's own tests: accelerates each model once PEFT made or changed it.

    PEFT_SUITE=accelerated PEFT_SUITE_FOLDER=folder pytest -p accelerated ...

Each process writes the outcomes and counts that it saw into a file of the folder. With
PEFT_SUITE=plain nothing is accelerated and only outcomes are written. A session in which no layer
was swapped fails.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import peft
from peft import PeftMixedModel, PeftModel
from torch import nn

import adarank_fast as ada
from adarank_fast.adapters import fused_linear
from adarank_fast.adapters.groups import LayerState

ACCELERATED = os.environ.get("PEFT_SUITE") == "accelerated"

outcomes: dict[str, str] = {}
reasons: Counter[str] = Counter()
counts: Counter[str] = Counter()  # "swapped", "fused"


def accelerate(model: Any) -> None:
    """Give new LoRA layers, if there are any, their fused class."""
    if not isinstance(model, nn.Module):
        return
    classes = fused_linear.fused_classes()
    new = sum(type(module) in classes for module in model.modules())
    if new:
        ada.accelerate(model)
        counts["swapped"] += new


def then_accelerate(owner: Any, name: str, of_result: bool) -> None:
    """Accelerate what `owner.name` returns, or the model that it is called on."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        accelerate(result if of_result else args[0])
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
    if not ACCELERATED:
        return
    for cls in (PeftModel, PeftMixedModel):
        for name in ("__init__", "add_adapter", "load_adapter"):
            then_accelerate(cls, name, of_result=False)
    for name in ("get_peft_model", "inject_adapter_in_model"):
        then_accelerate(peft, name, of_result=True)
    LayerState.__del__ = count  # type: ignore[attr-defined]
    LayerState.__setstate__ = copy_without_counts  # type: ignore[attr-defined]


class EverythingSeen(dict[str, int]):
    """For PEFT's `hub_online_once`, which is offline only for models that it saw before."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


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
    found = {"counts": counts, "reasons": reasons, "outcomes": outcomes if controller else {}}
    (folder / f"{os.getpid()}.json").write_text(json.dumps(found), encoding="utf-8")
