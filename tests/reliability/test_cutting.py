"""Commands killed at random moments and on a disk that fails: nothing lost, the rerun is right."""

from __future__ import annotations

import pytest

from tests.reliability import cutting

SHORT = ("predict", "export", "save")  # the others take seconds each


@pytest.fixture(scope="module")
def here():
    with cutting.place() as made:
        yield made


@pytest.mark.parametrize("arm", [cutting.kills, cutting.full_disk])
def test_the_same_command_finishes_what_was_cut_off(here, arm):
    counts = arm(here, 600, seed=1, most=6, names=SHORT)
    assert not counts["faults"], "\n\n".join(counts["faults"])
    assert any(counts[name] for name in counts if name.startswith(("killed", "failed")))


def test_a_lost_file_and_a_file_too_many_are_found(here):
    here.measure("save")
    folder = here.start("save")
    before = cutting.listing(folder)
    (folder / "plan.json").unlink()
    assert here.harmed("save", before, cutting.listing(folder)) == ["plan.json"]
    (folder / "left.tmp").write_text("")
    assert "left.tmp" in "".join(here.finish("save", folder, {}))
    assert here.finish("save", folder, {"gone": b"line\n"})[-1].endswith("['gone']")
