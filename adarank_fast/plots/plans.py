"""Pictures of a plan: disagreement by layer and module type, ranks as a heat map, training curves.

matplotlib is used through its objects only: no pyplot, so no global state and no display.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING

from adarank_fast.errors import AdarankError
from adarank_fast.plan.rank_plan import RankPlan, Score
from adarank_fast.plan.table import UNITS
from adarank_fast.plots.style import clean, label, line_style, new_figure, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL = 0.34  # inches: a heat map cell with a three-digit number
LAYER = re.compile("[0-9]{1,9}")  # a part of a name that numbers a layer
UNSURE = 0.5  # chance of another rank that is worth a mark

Position = tuple[int | None, str]  # layer, label of the module type


def plot_plan(plan: RankPlan, path: str | os.PathLike[str]) -> None:
    """Disagreement by layer above, ranks by layer and module type below, on one layer axis.

    Args:
        plan: without scores only the ranks are drawn.
        path: .png, .pdf or .svg.

    Raises:
        AdarankImportError: matplotlib is not installed.
        AdarankError: matplotlib cannot write the file type.
    """
    if not plan.scores:
        return plot_ranks(plan, path)
    positions = arrange(plan.ranks)
    width, heat_height = _heat_size(positions)
    figure = new_figure(width, heat_height + 4.2)
    above, below = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [3.4, heat_height]}
    )
    _draw_disagreement(above, plan, positions)
    above.set_xlabel("")
    _draw_ranks(below, plan, positions)
    write(figure, path)


def plot_disagreement(plan: RankPlan, path: str | os.PathLike[str]) -> None:
    """Disagreement by layer, one line a module type, error bars the std over trials.

    Raises:
        AdarankError: the plan has no scores.
    """
    if not plan.scores:
        raise AdarankError("this plan has no scores to plot (it was not made by probing)")
    positions = arrange(plan.ranks)
    figure = new_figure(max(_heat_size(positions)[0], 8.0), 4.2)
    axes = figure.subplots()
    _draw_disagreement(axes, plan, positions)
    _layer_axis(axes, positions)
    write(figure, path)


def plot_ranks(plan: RankPlan, path: str | os.PathLike[str]) -> None:
    """Heat map of the ranks, layers across, module types down, the ranks in the cells."""
    positions = arrange(plan.ranks)
    figure = new_figure(*_heat_size(positions))
    _draw_ranks(figure.subplots(), plan, positions)
    write(figure, path)


def arrange(names: Iterable[str]) -> dict[str, Position]:
    """Layer and short, unambiguous module type of each name.

    The layer is the first integer in the dotted path (None: there is none), the module type is the
    rest. Its label is the last part, plus whatever parts tell it from other types: `query`, but
    `encoder.SelfAttention.q` and `decoder.SelfAttention.q` in T5.
    """
    split = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if LAYER.fullmatch(part)), None)
        layer = None if at is None else int(parts[at])
        split[name] = layer, tuple(part for i, part in enumerate(parts) if i != at)
    types = sorted({kind for _, kind in split.values()})
    labels = {kind: _label(kind, types) for kind in types}
    taken = list(labels.values())
    labels = {k: one if taken.count(one) == 1 else ".".join(k) for k, one in labels.items()}
    return {name: (layer, labels[kind]) for name, (layer, kind) in split.items()}


def _label(kind: tuple[str, ...], types: Iterable[tuple[str, ...]]) -> str:
    """The last part of `kind`, plus parts, from the right, that other types with it lack."""
    chosen = [len(kind) - 1]
    alike = [other for other in types if other != kind and other[-1] == kind[-1]]
    while alike:
        telling = [
            i
            for i in range(len(kind) - 1)
            if i not in chosen and any(kind[i] not in other for other in alike)
        ]
        if not telling:
            break
        chosen.append(telling[-1])
        alike = [other for other in alike if kind[telling[-1]] in other]
    return ".".join(kind[i] for i in sorted(chosen))


def _columns(positions: Mapping[str, Position]) -> list[int | None]:
    """Layers from left to right; modules outside any layer come last."""
    layers = {layer for layer, _ in positions.values()}
    return [*sorted(layer for layer in layers if layer is not None), *({None} & layers)]


def _types(positions: Mapping[str, Position]) -> list[str]:
    """Module types in the plan's order, which is the model's; those outside any layer come last."""
    outside: dict[str, bool] = {}
    for layer, kind in positions.values():
        outside.setdefault(kind, layer is None)
    return sorted(outside, key=lambda kind: outside[kind])


def _draw_disagreement(axes: Axes, plan: RankPlan, positions: Mapping[str, Position]) -> None:
    column = {layer: x for x, layer in enumerate(_columns(positions))}
    types = _types(positions)
    for index, kind_of_line in enumerate(types):
        style = line_style(index)
        line: list[tuple[int, Score]] = []
        alone: list[tuple[int, Score]] = []
        for name, (layer, kind) in positions.items():
            if kind == kind_of_line and name in plan.scores:
                (alone if layer is None else line).append((column[layer], plan.scores[name]))
        line.sort(key=itemgetter(0))
        for points, options in ((line, style), (alone, {**style, "linestyle": "none"})):
            if points:
                axes.errorbar(
                    [x for x, _ in points],
                    [score.mean for _, score in points],
                    yerr=[score.std for _, score in points],
                    capsize=2.5,
                    elinewidth=1,
                    label=label(kind_of_line) if points is line or not line else None,
                    **options,
                )
    unit = UNITS.get(plan.settings.get("metric", ""))
    axes.set_ylabel(f"disagreement:\n{unit}" if unit else "disagreement")
    axes.set_ylim(bottom=0)
    trials = {len(score.trials) for score in plan.scores.values()}
    spread = f", mean ± std of {_range(trials)} trials" if max(trials) > 1 else ""
    axes.set_title(f"Disagreement when one module is perturbed{spread}", fontsize=11, loc="left")
    clean(axes)
    axes.legend(
        frameon=False,
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        ncols=1 + (len(types) - 1) // 22,
    )


def _draw_ranks(axes: Axes, plan: RankPlan, positions: Mapping[str, Position]) -> None:
    columns, types = _columns(positions), _types(positions)
    cells: dict[tuple[int, int], list[int]] = {}
    chances = plan.chance_of_change() or {}
    unsure = set()
    for name, (layer, kind) in positions.items():
        key = (types.index(kind), columns.index(layer))
        cells.setdefault(key, []).append(plan.ranks[name])
        if chances.get(name, 0.0) > UNSURE:
            unsure.add(key)
    table = [[float("nan")] * len(columns) for _ in types]
    for (row, column), ranks in cells.items():
        table[row][column] = statistics.fmean(ranks)
    largest = max(max(plan.ranks.values()), 1)
    axes.imshow(table, cmap="Blues", vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    for (row, column), ranks in cells.items():
        dark = table[row][column] > 0.6 * largest
        axes.text(
            column,
            row,
            _range(set(ranks)) + ("~" if (row, column) in unsure else ""),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
        )
    axes.set_yticks(range(len(types)), labels=[*map(label, types)], fontsize=9)
    axes.set_facecolor("0.93")  # a type that a layer does not have
    axes.set_xticks([x - 0.5 for x in range(1, len(columns))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(types))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    title = f"Rank of each module, {plan.parameters:,} adapter parameters in all"
    if unsure:
        title += f"\n~: another seed gives another rank with a chance above {UNSURE:.0%}"
    axes.set_title(title, fontsize=11, loc="left")
    _layer_axis(axes, positions)


def _layer_axis(axes: Axes, positions: Mapping[str, Position]) -> None:
    columns = _columns(positions)
    ticks = ["other" if layer is None else str(layer) for layer in columns]
    axes.set_xticks(range(len(columns)), labels=ticks, fontsize=8)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_xlabel("layer")


def _heat_size(positions: Mapping[str, Position]) -> tuple[float, float]:
    """Width and height in inches of a figure with a readable heat map."""
    types = _types(positions)
    labels = 0.085 * max(len(label(kind)) for kind in types) + 0.3
    return max(CELL * len(_columns(positions)) + 2 * labels, 7.5), 0.3 * len(types) + 1.1


def _range(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"
