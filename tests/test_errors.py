"""What is refused is refused with one class, and no check of data or files is an `assert`."""

from __future__ import annotations

import ast
import builtins
import subprocess
import sys
from pathlib import Path

import pytest

import adarank_fast as ada
from adarank_fast import errors

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "adarank_fast", ROOT / "kernels" / "adarank_kernels")
USUAL = {
    errors.AdarankTypeError: TypeError,
    errors.AdarankFileNotFoundError: FileNotFoundError,
    errors.AdarankPermissionError: PermissionError,
    errors.AdarankTimeoutError: TimeoutError,
    errors.AdarankImportError: ImportError,
    errors.AdarankRuntimeError: RuntimeError,
}
# for nobody but our own code: caught where they are raised, or asked for by Python itself
INTERNAL = {
    "ArithmeticError": ("graphs.py", "registry.py", "philox.py", "triton_launch.py")
    + ("triton_gradients_launch.py",),
    "AttributeError": ("__init__.py", "outputs.py"),
    "FileNotFoundError": ("native.py",),
    "IndexError": ("lookups.py",),
    "RuntimeError": ("native.py", "gated_mlp.py", "graph_backends.py"),  # torch's own words
    "TimeoutError": ("native.py",),
    "ValueError": ("checkpoint.py", "files.py", "grid.py", "json_values.py"),
}


@pytest.mark.parametrize("kind", USUAL)
def test_refusals_are_also_what_people_catch(kind):
    error = kind("x=1 is wrong; give 2")
    assert isinstance(error, (ada.AdarankError, ValueError)) and isinstance(error, USUAL[kind])
    assert str(error) == "x=1 is wrong; give 2"


def test_whatever_is_raised_is_ours():
    odd = []
    for file in (file for package in PACKAGES for file in package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            made = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(made, ast.Call) and isinstance(made.func, ast.Name):
                name = made.func.id
                builtin = name[:1].isupper() and hasattr(builtins, name)
                if builtin and file.name not in INTERNAL.get(name, ()):
                    odd.append(f"{file.name}:{node.lineno} {name}")
    assert not odd


def test_a_foreign_file_is_left_alone_without_asserts(tmp_path):
    """`python -O` drops assert statements."""
    foreign = tmp_path / "letter"
    foreign.write_text("Dear all,")  # one line without an end, as of a kill in the first line
    code = (
        "import sys; from adarank_fast.prediction.checkpoint import Checkpoint\n"
        "try: Checkpoint(sys.argv[1], {})\n"
        "except ValueError as error: print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-O", "-c", code, foreign], capture_output=True, text=True
    )
    assert "is no checkpoint" in ran.stdout, ran.stderr
    assert foreign.read_text() == "Dear all,"
