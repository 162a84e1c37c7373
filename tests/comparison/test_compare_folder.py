"""A comparison's folder: whose it is, what it holds, who may write into it."""

from __future__ import annotations

import pytest

from adarank_fast.comparison import grid
from tests.comparison.comparisons import Killed, named, run

QUICK = dict(arms=("uniform",), seeds=1, learning_rates=(1e-2,))


@pytest.mark.parametrize(
    "content",
    [
        ["plans/adarank.json"],
        ["settings.json"],
        ["cells/run-uniform-seed0-rate0.01.json"],
        ["data"],
    ],
)
def test_a_folder_of_others_is_left_alone(finished, tmp_path, content):
    for name in content:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for take in (lambda: run(work_dir=tmp_path), lambda: finished[1].save(tmp_path)):
        with pytest.raises(ValueError, match="is not empty and adarank-fast did not make it"):
            take()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [str(path.relative_to(tmp_path)) for path in files] == content
    assert files[0].read_text() == "mine"


def killed_in_the_first_run(folder, monkeypatch):
    def fit(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(grid, "fit", fit)
        with pytest.raises(Killed):
            run(work_dir=folder, **QUICK)


def test_before_a_cell_is_finished_the_settings_may_change(tmp_path, monkeypatch):
    killed_in_the_first_run(tmp_path, monkeypatch)
    (tmp_path / "cells" / "notes").write_text("mine")
    made = run(work_dir=tmp_path, **QUICK | dict(average_rank=1))
    assert set(made.plans["uniform"].ranks.values()) == {1}
    assert (tmp_path / "cells" / "notes").read_text() == "mine"


def test_before_a_cell_is_finished_the_same_call_keeps_the_plans(tmp_path, monkeypatch):
    """A prediction may have taken minutes when the run is killed."""
    killed_in_the_first_run(tmp_path, monkeypatch)
    plan = tmp_path / "cells" / "plans" / "uniform.json"
    before = plan.read_bytes()
    run(work_dir=tmp_path, **QUICK)
    assert plan.read_bytes() == before


def test_an_input_in_the_folder_is_left_alone(tmp_path):
    made = run(work_dir=tmp_path / "report", **QUICK)
    made.save(tmp_path / "report")
    plan = tmp_path / "report" / "plans" / "mine.json"
    made.plans["uniform"].save(plan)
    before = plan.read_bytes()
    with pytest.raises(ValueError, match="is read from there; name another"):
        run(work_dir=tmp_path / "report", **QUICK | dict(arms=(plan, "uniform")))
    assert plan.read_bytes() == before


def test_one_comparison_at_a_time(tmp_path):
    def second(line):
        with pytest.raises(ValueError, match="is in use by another run"):
            run(work_dir=tmp_path, **QUICK)

    run(work_dir=tmp_path, progress=second, **QUICK)


def accuracy(predictions, labels):
    return float((predictions.argmax(-1) == labels).mean())


def another(function):
    def accuracy(predictions, labels):
        return function(predictions, labels)

    accuracy.__qualname__ = "accuracy"
    return accuracy


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(metric=another(lambda p, y: -accuracy(p, y))), "with metric_function"),
        (dict(modules_to_save=[]), "with modules_to_save"),
        (dict(arms=(named("uniformly"),)), r"arm .* has changed since it was trained"),
    ],
)
def test_what_a_finished_cell_depends_on(finished, tmp_path, change, message):
    options = dict(QUICK, metric=accuracy, arms=(another_allocator(),))
    made = run(work_dir=tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        run(work_dir=tmp_path, **options | change)
    with pytest.raises(ValueError, match="holds a comparison with"):
        finished[1].save(tmp_path)
    made.save(tmp_path)
    assert run(work_dir=tmp_path, **options).results == made.results


def another_allocator():
    def uniformly(problem):
        return problem.uniform

    return uniformly


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": "x"}'])
def test_a_damaged_cell(tmp_path, damage):
    run(work_dir=tmp_path, **QUICK)
    (cell,) = (tmp_path / "cells").glob("*.json")
    whole = cell.read_text()
    cell.write_text(damage)
    with pytest.raises(ValueError, match="is damaged; delete that cell's files to run it again"):
        run(work_dir=tmp_path, **QUICK)
    cell.write_text(whole)
    cell.with_suffix(".npz").write_bytes(b"PK" + damage.encode())
    with pytest.raises(ValueError, match="is damaged; delete that cell's files to run it again"):
        run(work_dir=tmp_path, **QUICK)
