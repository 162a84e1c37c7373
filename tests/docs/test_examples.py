"""The scripts and notebooks of examples/, shortened, in this process."""

from __future__ import annotations

import inspect
import os
import runpy
import sys

import nbformat
import pytest

from tests.docs.pages import ROOT

FOLDER = ROOT / "examples"
SCRIPTS = ["accelerate_peft", "own_allocator", "predict_and_inspect", "train_classifier"]
SCRIPTS += ["tune_language_model"]
NOTEBOOKS = ["first_plan", "train_and_compare"]


@pytest.fixture(autouse=True)
def in_the_folder(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))  # toy.py
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("toy", None)
    assert not os.listdir(tmp_path), "an example leaves files behind"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name):
    main = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="example")["main"]
    (argument,) = inspect.signature(main).parameters
    main(**{argument: 2})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks(name):
    pytest.importorskip("IPython")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    names: dict[str, object] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, "committed without outputs: `make docs` makes them"
            code = cell.source.replace("STEPS = 40", "STEPS = 2")
            exec(compile(code, cell.id, "exec"), names)


def test_all_are_here_and_told_of():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"toy"}
    notebooks = {path.stem for path in FOLDER.glob("*.ipynb")}
    assert (scripts, notebooks) == (set(SCRIPTS), set(NOTEBOOKS))
    told = (FOLDER / "README.md").read_text()
    assert all(f"{name}." in told for name in scripts | notebooks)
