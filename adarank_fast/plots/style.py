"""What all pictures share: figures, line styles, axes, and how they are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from adarank_fast.errors import AdarankError, printable
from adarank_fast.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>"
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKED = 12  # markers on a line, at most about
DPI = 130
MOST_PIXELS = 2**16 - 1  # of matplotlib, each way
LONGEST = 80  # of a name in a picture


class LineStyle(TypedDict):
    """Keyword arguments of `Axes.plot`."""

    color: str
    linestyle: str | tuple[float, tuple[float, ...]]
    marker: str
    markersize: float
    linewidth: float


def line_style(index: int) -> LineStyle:
    """A line's look; 40 different ones before they repeat.

    Lines that lie on each other are told apart: a dashed one shows the one beneath in its gaps,
    and each that comes later is thinner.
    """
    return {
        "color": f"C{index % 10}",
        "linestyle": DASHES[(index + index // 20) % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
        "linewidth": max(2.2 - 0.3 * (index % 5), 1.2),
    }


def label(name: str) -> str:
    """A name for matplotlib, in which `$` starts no formula and a leading `_` hides nothing."""
    shown = printable(name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}...")
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def clean(axes: Axes, grid: Literal["both", "x", "y"] = "y") -> None:
    """Faint grid lines along `grid`, and no frame at the top and on the right."""
    axes.grid(axis=grid, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", which="minor", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def new_figure(width: float, height: float) -> Figure:
    """A figure of this many inches, drawn without pyplot's global state.

    Raises:
        AdarankError: it would have more pixels on a side than matplotlib draws.
    """
    from matplotlib.figure import Figure

    if max(width, height) * DPI > MOST_PIXELS:
        raise AdarankError(
            f"a picture of {width:.0f} x {height:.0f} inches is too large to draw; plot fewer names"
        )
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def write(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the picture, as a whole or not at all; the path's suffix says which kind.

    Raises:
        AdarankError: matplotlib does not write that kind.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kind = Path(path).suffix[1:].lower() or "png"
    supported = FigureCanvasAgg(figure).get_supported_filetypes()
    if kind not in supported:
        raise AdarankError(f"path={str(path)!r}: cannot draw .{kind}; use .png, .pdf or .svg")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind)
