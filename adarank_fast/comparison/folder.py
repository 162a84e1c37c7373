"""A comparison's folder: whose it is, and what lies in it.

`settings.json` says what is compared. `cells/` holds what a later run goes on from: the finished
cells and, in `cells/plans/`, the arms' plans. All else is the report, made anew at each run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adarank_fast.comparison.allocators import (
    Allocator,
    Problem,
    allocate,
    find_allocator,
    is_plan_file,
    load_plan,
)
from adarank_fast.errors import AdarankError
from adarank_fast.files import note_settings, noted_settings_are

if TYPE_CHECKING:
    from adarank_fast.plan.rank_plan import RankPlan

COMPARISON = "comparison"  # its mark
CELLS = "cells"
REMEDY = "name another folder or delete that one"


def claim(folder: Path, settings: Mapping[str, object]) -> str:
    """Note what is compared, or check that it is the same; see `note_settings`.

    While no cell is finished, other settings replace the old ones and the plans. Arms and seeds are
    not among the settings: they can be added.

    Args:
        folder: opened with `own_folder`.
        settings: what the cells depend on; and "date", if it is known.
    """
    cells = folder / CELLS
    if not any(cells.glob("*.json")) and not noted_settings_are(folder, settings):
        (folder / "settings.json").unlink(missing_ok=True)
        for plan in (cells / "plans").glob("*.json"):
            plan.unlink()
    return note_settings(folder, settings, "a comparison", REMEDY)


def arm_plan(folder: Path, label: str, arm: str | Allocator, problem: Problem) -> RankPlan:
    """The arm's plan, from the comparison's folder if it is there.

    Raises:
        AdarankError: another plan file or allocator than the one that its cells were trained with.
    """
    from adarank_fast.models.identity import qualified_name

    path, of_file = folder / CELLS / "plans" / f"{label}.json", is_plan_file(arm)
    made_by = "a plan file" if of_file else qualified_name(find_allocator(arm)[1])
    if not path.exists():
        plan = allocate(arm, problem)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(plan, settings={**plan.settings, "made by": made_by}).save(path)
    plan = load_plan(str(path))
    before = plan.settings.pop("made by", None)
    if before != made_by or of_file and load_plan(str(arm)).ranks != plan.ranks:
        raise AdarankError(
            f"arm {arm!r} has changed since it was trained in {str(folder)!r} (made by {before}, "
            f"now {made_by}); name the arm or the folder otherwise"
        )
    return plan
