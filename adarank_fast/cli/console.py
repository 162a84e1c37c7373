"""What commands say: tables and JSON on stdout, everything else on stderr."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from adarank_fast.models.text import plain_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from adarank_fast.comparison.report import Comparison


@contextmanager
def status(message: str) -> Iterator[None]:
    """A spinner on stderr, on terminals only."""
    with Console(stderr=True).status(f"{message} ..."):
        yield


def show(table: RenderableType) -> None:
    """Print a rich table on stdout, in 80 columns where that is no terminal."""
    console = Console(markup=False, highlight=False)
    if console.is_terminal:
        console.print(table)
    else:
        print(plain_text(table, blank_lines=True))


def show_report(
    report: Comparison, folder: Path, as_json: bool, understood: Mapping[str, object] | None = None
) -> None:
    """The tables of a comparison and what they say, or its results as JSON."""
    from adarank_fast.comparison.findings import reading
    from adarank_fast.comparison.report import rich_tables

    if as_json:
        more = {} if understood is None else {"understood": understood}
        print(json.dumps({**report.results, **more}))
        return
    for table in rich_tables(report.results):
        show(table)
    for line in reading(report.results):
        show(line)
    say_written(folder / "report.html", f"open it; each arm's plan is in {folder / 'plans'}")


def say_written(path: Path, then: str, as_json: Mapping[str, object] | None = None) -> None:
    """Say "wrote `path`" and what to do next on stderr; or instead of it `as_json` on stdout."""
    if as_json is None:
        print(f"wrote {path}", file=sys.stderr)
        say_next(then)
    else:
        print(json.dumps(as_json))


def say_next(then: str) -> None:
    """One line on stderr: what to do next."""
    print(f"Next: {then}", file=sys.stderr)


def typed(*parts: object) -> str:
    """A command as one types it."""
    return shlex.join(map(str, parts))


def quiet_transformers() -> None:
    """Without transformers' progress bars, load reports and deprecations: problems are raised."""
    import warnings

    from transformers.utils import logging

    for module in ("transformers", "trl"):  # of calls that libraries make of each other
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)

    logging.set_verbosity_error()
    logging.disable_progress_bar()
