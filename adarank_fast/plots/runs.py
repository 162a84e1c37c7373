"""Pictures of training runs: curves, and intervals of means."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence

from adarank_fast.errors import AdarankError
from adarank_fast.plots.style import MARKED, clean, label, line_style, new_figure, write


def plot_training(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike[str],
    ylabel: str,
    xlabel: str = "step",
    ticks: Sequence[float] | None = None,
    order: Sequence[str] | None = None,
) -> None:
    """One line per entry of `curves`: label -> (step, value) pairs.

    Args:
        curves: at least one.
        path: see `style.write`.
        ylabel: of the values.
        xlabel: of the steps.
        order: of all labels, also those not here: one keeps its colour from picture to picture.
        ticks: the only values marked on a logarithmic x axis. None: the axis is linear.
    """
    if not curves:
        raise AdarankError("curves is empty; give at least one line")
    figure = new_figure(5.5, 3.4)
    axes = figure.subplots()
    order = order or list(curves)
    for name, points in curves.items():
        place = order.index(name)
        step = -(-len(points) // MARKED)
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=label(name),
            markevery=(place * step // len(order), step),  # not where another line has its own
            **line_style(place),
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    clean(axes)
    if ticks is not None:
        axes.set_xscale("log")
        axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    else:
        axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)
    write(figure, path)


def plot_intervals(
    rows: Mapping[str, tuple[Sequence[float], float | None, float | None]],
    path: str | os.PathLike[str],
    xlabel: str,
    zero: bool = False,
    order: Sequence[str] | None = None,
) -> None:
    """One line per entry of `rows`: label -> (values, low, high): each value, mean and interval.

    Args:
        rows: an interval of None is not drawn.
        path: see `style.write`.
        xlabel: of the values.
        zero: mark 0, for differences.
        order: see `plot_training`.
    """
    figure = new_figure(5.5, 0.9 + 0.4 * len(rows))
    axes = figure.subplots()
    order = order or list(rows)
    for row, (name, (values, low, high)) in enumerate(rows.items()):
        color = f"C{order.index(name) % 10}"
        if low is not None and high is not None:
            axes.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(values, [row] * len(values), "o", color=color, alpha=0.45, markersize=5)
        if values:
            axes.plot([statistics.fmean(values)], [row], "D", color=color, markersize=7)
    if zero:
        axes.axvline(0, color="0.2", linewidth=1.5, linestyle="--")
    axes.set_yticks(range(len(rows)), labels=[*map(label, rows)])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    clean(axes, "x")
    write(figure, path)
