"""CONTRIBUTING.md: its tables of rooms are those of the tree."""

from __future__ import annotations

import ast
import re
import subprocess

import pytest

from tests.docs.pages import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PACKAGES = {
    "adarank_fast": ROOT / "adarank_fast",
    "adarank_kernels": ROOT / "kernels/adarank_kernels",
}


def table(start: str) -> list[tuple[list[str], str]]:
    """(names in the first cell, last cell) of each row of the table whose head begins so."""
    lines = TEXT[TEXT.index(start) :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(re.findall(r"`(\S+?)/?`", row[0]), row[-1]) for row in cells]


ROOMS = {
    "adarank_fast": table("| room of `adarank_fast/`"),
    "adarank_kernels": table("| room of `kernels/adarank_kernels/`"),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_is_listed_once(package):
    listed = [name for names, _ in ROOMS[package] for name in names]
    there = {path.name for path in PACKAGES[package].iterdir() if path.suffix in ("", ".py")}
    assert sorted(listed) == sorted(there - {"__init__.py", "__main__.py", "__pycache__"})


def test_folders_beside_them_are_listed():
    listed = {name for names, _ in table("| beside them") for name in names}
    ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."}
    made = {"adarank_fast", "kernels", "shared", "__pycache__", "report", "adarank_fast.egg-info"}
    assert listed <= folders and folders - ignored - made <= listed


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_what_their_line_names(package):
    files = {name for names, _ in ROOMS[package] for name in names if name.endswith(".py")}
    above: set[str] = set(files)
    for names, may in ROOMS[package]:
        allowed = set(re.findall(r"`([\w.]+)(?:/[\w.]+)?`", may)) | files
        if "all above" in may:
            allowed = above - allowed | files
        if not any(name.endswith(".py") for name in names) and may != "everything":
            for name in names:
                assert imports(package, name) - {name} <= allowed, name
        above |= set(names)


def imports(package: str, room: str) -> set[str]:
    """The rooms that a room imports, and `adarank_kernels`."""
    found = set()
    for file in (PACKAGES[package] / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                first, _, rest = node.module.partition(".")
                name = rest.partition(".")[0] if first == package else first
                if first in PACKAGES and name:
                    found.add(name if (PACKAGES[package] / name).is_dir() else f"{name}.py")
    return {name.removesuffix(".py") if name == "adarank_kernels.py" else name for name in found}


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {t for p in pages for t in re.findall(r"`make ([a-z][\w-]*)", p.read_text())}
    assert named <= targets, named - targets


def test_make_help():
    lines = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    told = dict(line.split(maxsplit=1) for line in lines.stdout.splitlines())
    assert {"demo", "test", "lint", "docs", "release-check", "bench-gpu"} <= set(told)
    assert max(map(len, lines.stdout.splitlines())) <= 80
