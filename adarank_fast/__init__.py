"""adarank-fast: predict a LoRA rank for every module, inject adapters of those ranks, compare.

The method is AdaRank, arXiv 2408.09015.
"""

from importlib.metadata import version as _version

from adarank_fast.adapters import inject
from adarank_fast.allocation import allocate_ranks
from adarank_fast.cost import CostEstimate, estimate_cost
from adarank_fast.fused import FusionReport, accelerate, fusion_report, restore
from adarank_fast.plan import RankPlan, Score
from adarank_fast.prediction import perturbation, predict_ranks
from adarank_fast.targets import Target, find_targets

__version__ = _version("adarank-fast")

__all__ = [
    "FusionReport",
    "accelerate",
    "fusion_report",
    "restore",
    "CostEstimate",
    "RankPlan",
    "Score",
    "Target",
    "allocate_ranks",
    "estimate_cost",
    "find_targets",
    "inject",
    "perturbation",
    "predict_ranks",
]
