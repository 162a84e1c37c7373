"""A plan as fixed-width text, and the units of its disagreements."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from adarank_fast.errors import printable
from adarank_fast.models.text import WIDTH, by, plain_text

if TYPE_CHECKING:
    from rich.table import Table

    from adarank_fast.plan.rank_plan import RankPlan, Score

UNITS = {  # of a disagreement by its metric
    "l1": "mean |change of an output|",
    "tv": "total variation distance",
    "kl": "KL divergence, nats",
    "js": "Jensen-Shannon divergence, nats",
    "argmax": "share of changed predictions",
}


def plan_table(plan: RankPlan) -> str:
    """See `RankPlan.table`."""
    chances = plan.chance_of_change()
    names = {name: printable(name) for name in plan.ranks}
    for sizes in (True,) if plan.experts else (True, False):  # of experts they say whose rank it is
        rows = _rows(plan, names, chances, sizes)
        text = plain_text(rows, width=10_000)
        if (over := max(map(len, text.splitlines())) - WIDTH) <= 0:
            break
    else:
        width = max(map(len, names.values())) - over
        names = {name: _folded(said, width) for name, said in names.items()}
        text = plain_text(_rows(plan, names, chances, sizes))
    return "\n".join([text, *textwrap.wrap(_reading(plan, chances is not None), WIDTH)])


def _folded(name: str, width: int) -> str:
    """A name in lines of so many letters, where its dots allow it."""
    lines = [""]
    for part in re.split(r"(?<=\.)", name):
        if lines[-1].strip() and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _rows(
    plan: RankPlan, names: Mapping[str, str], chances: Mapping[str, float] | None, sizes: bool
) -> Table:
    from rich import box
    from rich.table import Table

    rows = Table(box=box.SIMPLE, show_footer=True, pad_edge=False, collapse_padding=True)
    rows.add_column("module", f"{len(plan.ranks)} modules", overflow="fold")
    trials = {len(score.trials) for score in plan.scores.values()}

    def add(header: str, footer: str = "") -> None:
        rows.add_column(header, footer, justify="right", no_wrap=True)

    if sizes:
        add("in x out")
    if plan.scores:
        add("disagreement")
    if len(trials) > 1:
        add("trials", str(sum(len(score.trials) for score in plan.scores.values())))
    add("rank", str(sum(plan.ranks.values())))
    if chances is not None:
        add("may\nchange")
    add("parameters", f"{plan.parameters:,}")
    experts = plan.experts
    for name, rank in plan.ranks.items():
        score = plan.scores.get(name)
        cells = [names[name]]
        if sizes:
            cells.append(by(plan.sizes[name], experts[name].total if name in experts else 1))
        if plan.scores:
            cells.append("" if score is None else _said(score))
        if len(trials) > 1:
            cells.append("" if score is None else str(len(score.trials)))
        cells.append(str(rank))
        if chances is not None:
            cells.append(f"{chances[name]:.0%}")
        rows.add_row(*cells, f"{rank * sum(plan.sizes[name]):,}")
    return rows


def _said(score: Score) -> str:
    said = f"{score.mean:.4g}"
    if len(score.trials) > 1:
        said += f" ± {score.std / score.mean if score.mean else 0.0:.0%}"
    return said


def _reading(plan: RankPlan, chances: bool) -> str:
    """What the columns are, and in which units."""
    if not plan.scores:
        return ""
    said = "Disagreement: how far the output moves when one module is perturbed"
    metric = plan.settings.get("metric", "")
    if metric in UNITS:
        said += f" ({UNITS[metric]})"
    trials = {len(score.trials) for score in plan.scores.values()}
    if max(trials) > 1:
        number = f"{max(trials)} trials" if len(trials) == 1 else "the trials"
        said += f", mean ± standard deviation of {number}"
    if chances:
        said += ". May change: the chance that another seed gives another rank"
    return f"{said}."
