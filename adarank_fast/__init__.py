"""adarank-fast: predict a LoRA rank for every module, inject adapters of those ranks, compare.

The method is AdaRank, arXiv 2408.09015. Names are imported when they are first used: `import
adarank_fast` alone loads neither torch nor peft.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adarank_fast.adapters.accelerate import accelerate, restore
    from adarank_fast.adapters.compile_blocks import compile_blocks
    from adarank_fast.adapters.export import export_uniform
    from adarank_fast.adapters.fusion_report import FusionReport, fusion_report
    from adarank_fast.adapters.graph_blocks import GraphReport, graph_blocks, graph_report
    from adarank_fast.adapters.inject import inject
    from adarank_fast.benchmarking.benchmark import benchmark
    from adarank_fast.benchmarking.report import Benchmark
    from adarank_fast.comparison.compare import compare
    from adarank_fast.comparison.design import Design
    from adarank_fast.errors import AdarankError, AdarankTypeError
    from adarank_fast.models.targets import Target, find_targets
    from adarank_fast.plan.allocation import allocate_ranks
    from adarank_fast.plan.budget import Budget
    from adarank_fast.plan.rank_plan import RankPlan, Score
    from adarank_fast.plan.trainer_formats import export_plan
    from adarank_fast.plan.uncertainty import AdaptiveTrials
    from adarank_fast.plots.plans import plot_plan
    from adarank_fast.prediction.cost import CostEstimate, estimate_cost
    from adarank_fast.prediction.model_disagreement import model_disagreement
    from adarank_fast.prediction.noise import perturbation
    from adarank_fast.prediction.predict import predict_ranks
    from adarank_fast.prediction.probe import Limits, Probe
    from adarank_fast.training.buckets import BucketCollator
    from adarank_fast.training.trained import evaluate

__version__ = _version("adarank-fast")

__all__ = [
    "AdarankError",
    "AdarankTypeError",
    "AdaptiveTrials",
    "Benchmark",
    "BucketCollator",
    "Budget",
    "CostEstimate",
    "Design",
    "FusionReport",
    "GraphReport",
    "Limits",
    "Probe",
    "RankPlan",
    "Score",
    "Target",
    "accelerate",
    "allocate_ranks",
    "benchmark",
    "compare",
    "compile_blocks",
    "estimate_cost",
    "evaluate",
    "export_plan",
    "export_uniform",
    "find_targets",
    "fusion_report",
    "graph_blocks",
    "graph_report",
    "inject",
    "model_disagreement",
    "perturbation",
    "plot_plan",
    "predict_ranks",
    "restore",
]

_MODULES = {
    "adapters.compile_blocks": ["compile_blocks"],
    "adapters.export": ["export_uniform"],
    "adapters.accelerate": ["accelerate", "restore"],
    "adapters.fusion_report": ["FusionReport", "fusion_report"],
    "adapters.graph_blocks": ["GraphReport", "graph_blocks", "graph_report"],
    "adapters.inject": ["inject"],
    "benchmarking.benchmark": ["benchmark"],
    "benchmarking.report": ["Benchmark"],
    "comparison.compare": ["compare"],
    "comparison.design": ["Design"],
    "errors": ["AdarankError", "AdarankTypeError"],
    "models.targets": ["Target", "find_targets"],
    "plan.allocation": ["allocate_ranks"],
    "plan.budget": ["Budget"],
    "plan.rank_plan": ["RankPlan", "Score"],
    "plan.trainer_formats": ["export_plan"],
    "plan.uncertainty": ["AdaptiveTrials"],
    "plots.plans": ["plot_plan"],
    "prediction.cost": ["CostEstimate", "estimate_cost"],
    "prediction.model_disagreement": ["model_disagreement"],
    "prediction.noise": ["perturbation"],
    "prediction.predict": ["predict_ranks"],
    "prediction.probe": ["Limits", "Probe"],
    "training.buckets": ["BucketCollator"],
    "training.trained": ["evaluate"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        import difflib

        near = [] if name.startswith("_") else difflib.get_close_matches(name, __all__, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'adarank_fast' has no attribute {name!r}{meant}")
    return getattr(import_module(f"adarank_fast.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
