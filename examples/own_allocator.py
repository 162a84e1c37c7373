"""An allocator of your own against AdaRank and uniform ranks, under one parameter budget."""

from __future__ import annotations

import tempfile
from pathlib import Path

import adarank_fast as ada
from adarank_fast.comparison.allocators import Problem
from toy import save_encoder, texts


def deeper_is_more(problem: Problem) -> ada.RankPlan:
    """Rank in proportion to the depth of a module."""
    names = list(problem.uniform.ranks)
    weights = {name: 1.0 + index for index, name in enumerate(names)}
    return problem.within_budget(weights)


def main(steps: int = 40) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "encoder")
        save_encoder(folder)
        report = ada.compare(
            str(folder),
            texts(200),
            texts(100, seed=1),
            arms=["adarank", deeper_is_more, "uniform"],
            seeds=2,
            average_rank=2,
            max_steps=steps,
            learning_rates=(5e-3,),
        )
        print(report.table())
        report.save(Path(name, "report"))  # report.html needs no other file


if __name__ == "__main__":
    main()
