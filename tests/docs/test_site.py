"""What the site promises: a page for every public name, and figures that are true."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from tests.docs.pages import ROOT

FIGURES = ["benchmarks.md", "gpu.md", "results.md"]


@pytest.mark.parametrize("package", ["adarank_fast", "adarank_kernels"])
def test_every_public_name_has_a_docstring(package):
    """Its page is made of it: what it takes, returns and raises."""
    module = importlib.import_module(package)
    for name in module.__all__:
        thing = getattr(module, name)
        text = inspect.getdoc(thing) or ""
        assert len(text) > 40, name
        if inspect.isfunction(thing) and not name.endswith("_ref"):
            assert re.search(r"^(Args|Returns|Raises):$", text, re.M), name


@pytest.mark.parametrize("package", ["adarank_fast", "adarank_kernels"])
def test_every_public_name_has_a_page(package, monkeypatch):
    mkdocs = pytest.importorskip("mkdocs.config.defaults")
    from mkdocs.plugins import PluginCollection
    from mkdocs.structure.files import Files

    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pages = importlib.import_module("site_pages")
    config = mkdocs.MkDocsConfig()
    config.plugins = PluginCollection()
    config.plugins._current_plugin = None
    config.nav = [{"Guides": []}, {"Contributing": []}]
    paths = {file.src_uri for file in pages.on_files(Files([]), config)}
    module = importlib.import_module(package)
    public = {name for name in dir(module) if not name.startswith("_")}
    public -= {name for name in public if inspect.ismodule(getattr(module, name))}
    assert {f"api/{package}/{name}.md" for name in public} <= paths
    assert "..." not in pages.command_line().partition("**Commands**")[2].partition("##")[0]


def test_figures_of_the_readme_are_on_the_generated_pages():
    """A number in a table of README.md stands on a page that a benchmark writes."""
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## Figures") : readme.index("## When not to use it")]
    known = " ".join((ROOT / "docs" / page).read_text() for page in FIGURES)
    known_numbers = set(re.findall(r"(?<![\d.,])\d[\d.,]*\d|\d", known))
    for row in re.findall(r"^\| (?!what|added|prediction)(.*\d.*) \|$", section, re.M):
        for number in re.findall(r"(?:^|\s)(\d+\.\d+|\d+)(?= ms| \||$)", row):
            assert number in known_numbers, (number, row)


def test_one_version():
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"$', project, re.M)[1]
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"adarank_fast-{version}-" in (ROOT / "README.md").read_text()
