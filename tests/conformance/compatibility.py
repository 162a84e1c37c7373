"""Writes docs/compatibility.md: every architecture through every step of tests/conformance.

    python -m tests.conformance.compatibility [NAME ...]

Names are rows to try, without writing the page.

Beyond the tests: three pretrained models, and inductor as the compiler's backend (10 to 20 seconds
a row).
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence

import torch

from adarank_fast.demo.assets import AssetError
from bench.pages import DOCS, packages, table, template, write_page
from bench.results_file import machine
from tests.conformance import steps
from tests.conformance.architectures import ARCHITECTURES
from tests.conformance.pretrained import PRETRAINED

ROWS = {**ARCHITECTURES, **PRETRAINED}

PAGE = DOCS / "compatibility.md"
FAILED = "**no**"
SHORT = ("route", "fused calls", "groups", "attention / all linear", "plain PEFT")


def inductor(case: steps.Case) -> str:
    """Dropout draws the numbers that it draws in eager mode; sums are added in other orders."""
    with torch._inductor.config.patch(fallback_random=True):
        return steps.compiled(case, backend="inductor", tolerance=1e-4)


STEPS = {**steps.STEPS, "inductor": inductor}


def run(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """What each step returned for each architecture, or `FAILED`; errors go to stderr."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        print(name, file=sys.stderr)
        try:
            case = steps.Case(ROWS[name])
        except AssetError as error:
            print(f"{name}: {error}", file=sys.stderr)
            found[name] = dict.fromkeys(STEPS, "not run")
            continue
        cells = found[name] = {}
        for step, function in STEPS.items():
            try:
                with steps.slow_path(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    cells[step] = function(case)
            except Exception:  # a cell of the table, whatever went wrong
                cells[step] = FAILED
                print(f"{name}, {step}:", file=sys.stderr)
                traceback.print_exc()
    return found


def listed(found: dict[str, dict[str, str]], columns: Sequence[str]) -> str:
    lines = [(name, *(cells[column] for column in columns)) for name, cells in found.items()]
    return table(("", *columns), lines, left=len(columns) + 1)


def main(names: Sequence[str]) -> int:
    if unknown := [name for name in names if name not in ROWS]:
        print(f"no row {unknown[0]!r}; rows: {', '.join(ROWS)}", file=sys.stderr)
        return 2
    found = run(names or list(ROWS))
    failed = sum(cell == FAILED for cells in found.values() for cell in cells.values())
    if names:
        print(listed(found, list(STEPS)))
        return int(bool(failed))
    here = machine()
    text = template(PAGE.name).format(
        versions=f"Last run: {here['date']}, {packages(here)}.",
        found=listed(found, SHORT),
        steps=listed(found, [step for step in STEPS if step not in SHORT]),
    )
    write_page(PAGE, text)
    print(f"{len(found)} rows, {failed} failed cells")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
