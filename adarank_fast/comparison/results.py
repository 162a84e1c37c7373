"""The numbers of a comparison: what its runs come to, ready for results.json."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import cast

import numpy
import torch

from adarank_fast.comparison.metrics import Metric
from adarank_fast.comparison.numbers import (
    ArmNumbers,
    CellNumbers,
    DifferenceNumbers,
    Machine,
    Results,
    Settings,
)
from adarank_fast.comparison.statistics import disagreement, interval, paired
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.training.evaluation import Evaluation


def summarise(
    settings: Mapping[str, object],
    plans: Mapping[str, RankPlan],
    swept: Sequence[CellNumbers],
    runs: Sequence[CellNumbers],
    evaluations: Sequence[Evaluation | None],
    metric: Metric,
) -> Results:
    """All that is reported, of the results of the sweep's cells and of the runs.

    Args:
        settings: of the comparison, as they are reported.
        plans: arm -> its ranks.
        swept: results of the sweep's cells.
        runs: results of the runs.
        metric: what arms are compared by.
        evaluations: one a run; None for a run that diverged.
    """
    found = {
        arm: {
            run["seed"]: (run, evaluation)
            for run, evaluation in zip(runs, evaluations, strict=True)
            if run["arm"] == arm
        }
        for arm in plans
    }
    baseline = "uniform" if "uniform" in plans else list(plans)[-1]
    all_settings = cast(Settings, {**settings, "seeds": list(found[baseline])})
    return {
        "format": "adarank-fast comparison",
        "schema": 1,
        "settings": all_settings,
        "machine": _machine(runs),
        "baseline": baseline,
        "arms": {arm: _arm(plans[arm], all_settings, list(found[arm].values())) for arm in plans},
        "differences": {
            arm: _difference(found[arm], found[baseline], metric)
            for arm in plans
            if arm != baseline
        },
        "items_are": metric.items_are,
        "sweep": [
            {
                "arm": cell["arm"],
                "learning_rate": cell["learning_rate"],
                "value": cell["value"],
                "loss": cell["loss"],
                "diverged": cell["diverged"],
            }
            for cell in swept
        ],
        "runs": list(runs),
        "training_seconds": sum(cell["training_seconds"] for cell in [*swept, *runs]),
        "cell_seconds": sum(cell["seconds"] for cell in [*swept, *runs]),
        "cell_cpu_seconds": sum(cell["cpu_seconds"] for cell in [*swept, *runs]),
    }


def _arm(
    plan: RankPlan,
    settings: Settings,
    found: Sequence[tuple[CellNumbers, Evaluation | None]],
) -> ArmNumbers:
    runs = [run for run, _ in found]
    rate, rates = runs[0]["learning_rate"], settings["learning_rates"]
    values = [run["value"] for run in runs if run["value"] is not None]
    sound = all(run["diverged"] is None for run in runs)
    predictions = [evaluation.predictions for _, evaluation in found if evaluation is not None]
    memory = [run["peak_memory_bytes"] for run in runs if run["peak_memory_bytes"] is not None]
    return {
        "parameters": plan.parameters,
        "learning_rate": rate,
        "rate_at_the_edge": len(rates) > 1 and rate in (min(rates), max(rates)),
        "by_seed": {str(run["seed"]): run["value"] for run in runs},
        "diverged": {str(run["seed"]): run["diverged"] for run in runs if run["diverged"]},
        "value": interval(values).numbers() if sound else None,
        "seeds_disagree": disagreement(predictions) if sound else {},
        "step_seconds": statistics.median(run["step_seconds"] for run in runs),
        "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs),
        "prediction_seconds": plan.settings.get("seconds"),
        "peak_memory_bytes": max(memory, default=None),
        "lowest_rank": min(plan.ranks.values()),
        "highest_rank": max(plan.ranks.values()),
    }


def _difference(
    mine: Mapping[int, tuple[CellNumbers, Evaluation | None]],
    other: Mapping[int, tuple[CellNumbers, Evaluation | None]],
    metric: Metric,
) -> DifferenceNumbers | None:
    """Of one arm from the baseline, seed by seed and item by item; None if a run diverged."""
    pairs = [(mine[seed], other[seed]) for seed in mine]
    if any(run["diverged"] for pair in pairs for run, _ in pair):
        return None
    values = [
        (one["value"], another["value"])
        for (one, _), (another, _) in pairs
        if one["value"] is not None and another["value"] is not None
    ]
    first, second = zip(*values, strict=True)
    by_item = None
    if metric.items is not None:
        sides = [[metric.items(found) for _, found in side] for side in zip(*pairs, strict=True)]
        first_items, second_items = (numpy.mean(side, axis=0).tolist() for side in sides)
        by_item = paired(first_items, second_items).numbers()
    return {
        "by_seed": {str(seed): a - b for seed, (a, b) in zip(mine, values, strict=True)},
        "seeds": paired(first, second).numbers(),
        "items": by_item,
    }


def _machine(runs: Sequence[CellNumbers]) -> Machine:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "device": gpu or f"{os.cpu_count()} CPU cores",
        "threads": sorted({run["threads"] for run in runs}),
        "python": platform.python_version(),
    }
