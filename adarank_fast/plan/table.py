"""A plan as fixed-width text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adarank_fast.errors import printable
from adarank_fast.models.text import by, plain_text

if TYPE_CHECKING:
    from adarank_fast.plan.rank_plan import RankPlan, Score


def plan_table(plan: RankPlan) -> str:
    """See `RankPlan.table`."""
    from rich import box
    from rich.table import Table

    rows = Table(box=box.SIMPLE, show_footer=True, pad_edge=False)
    rows.add_column("module", f"{len(plan.ranks)} modules", no_wrap=True)
    rows.add_column("in x out", justify="right", no_wrap=True)
    chances = plan.chance_of_change()
    if plan.scores:
        count = sum(len(score.trials) for score in plan.scores.values())
        rows.add_column("disagreement", justify="right", no_wrap=True)
        rows.add_column("trials", str(count), justify="right", no_wrap=True)
    rows.add_column("rank", str(sum(plan.ranks.values())), justify="right", no_wrap=True)
    if chances is not None:
        rows.add_column("may change", justify="right", no_wrap=True)
    rows.add_column("parameters", f"{plan.parameters:,}", justify="right", no_wrap=True)
    experts = plan.experts
    for name, rank in plan.ranks.items():
        cells = [
            printable(name),
            by(plan.sizes[name], experts[name].total if name in experts else 1),
        ]
        if plan.scores:
            score = plan.scores.get(name)
            cells += ["", ""] if score is None else [_said(score), str(len(score.trials))]
        cells.append(str(rank))
        if chances is not None:
            cells.append(f"{chances[name]:.0%}")
        rows.add_row(*cells, f"{rank * sum(plan.sizes[name]):,}")
    return plain_text(rows)


def _said(score: Score) -> str:
    return f"{score.mean:.4g} ± {score.std:.2g}" if len(score.trials) > 1 else f"{score.mean:.4g}"
