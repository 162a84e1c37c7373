"""Pages that `mkdocs` makes from what is elsewhere.

A page for every public name, the options of every command, CONTRIBUTING.md and CHANGELOG.md.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

import adarank_fast
import adarank_kernels
from adarank_fast.cli.main import app

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "adarank_fast": "Modules, models, plans and files: `import adarank_fast as ada`.",
    "adarank_kernels": "Tensors in, tensors out. Needs torch and triton only.",
}
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


_ipython = tempfile.TemporaryDirectory()


def on_startup(**_: Any) -> None:
    """Notebooks run without anybody's own IPython settings, and say nothing about their sockets."""
    profile = Path(_ipython.name) / "profile_default"
    profile.mkdir()
    (profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 'ERROR'\n")
    os.environ["IPYTHONDIR"] = _ipython.name


def on_files(files: Files, config: MkDocsConfig) -> Files:
    def add(path: str, content: str) -> str:
        files.append(File.generated(config, path, content=content))
        return path

    nav: list[Any] = config.nav or []
    api: list[Any] = []
    for package, names in public_names().items():
        listed = "\n".join(f"- [`{name}`]({name}.md)" for name in names)
        index = f"# {package}\n\n{PACKAGES[package]}\n\n{listed}\n"
        pages: list[Any] = [add(f"api/{package}/index.md", index)]
        for name in names:
            heading = f"---\ntitle: {name}\n---\n\n::: {package}.{name}\n"
            pages.append({name: add(f"api/{package}/{name}.md", heading)})
        api.append({package: pages})
    add("command-line.md", command_line())
    where = [next(iter(entry)) for entry in nav].index("Guides") + 1
    nav.insert(where, {"API": api})
    last = nav[-1]["Contributing"]
    for source, path in ROOT_PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        for other, page in ROOT_PAGES.items():
            text = text.replace(f"]({other})", f"]({page})")
        last.append(add(path, text))
    return files


def public_names() -> dict[str, list[str]]:
    """Package -> every name in its `__all__`."""
    return {"adarank_fast": adarank_fast.__all__, "adarank_kernels": adarank_kernels.__all__}


def command_line() -> str:
    """Every command and option, as typer documents them."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="adarank")
    for name, one in command.commands.items():  # typer cuts these lines after a few words
        whole = f"* `{name}`: {inspect.cleandoc(one.help).splitlines()[0]}"
        text = re.sub(rf"^\* `{name}`: .*$", whole.replace("\\", r"\\"), text, flags=re.M)
    return text.replace("# `adarank`", "# Command line", 1)
