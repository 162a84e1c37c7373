"""What is importable, from where, and what it costs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, folder: Path, *path: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_name_kernels_is_left_alone(tmp_path):
    """Hugging Face owns it; transformers breaks if this repository answers to it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    assert run(code, tmp_path) == "None"
    # a bare folder on the path is at most a namespace, which transformers does not take for it
    assert run(code, ROOT, str(ROOT)) == "None"
    imports = "from transformers import LlamaForCausalLM; print('fine')"
    assert run(imports, ROOT, str(ROOT), str(ROOT / "kernels")) == "fine"


def test_the_kernels_need_torch_and_triton_only(tmp_path):
    code = (
        "import sys; from adarank_kernels import *; "
        "print([m for m in ('transformers', 'peft', 'adarank_fast') if m in sys.modules])"
    )
    assert run(code, tmp_path, str(ROOT / "kernels")) == "[]"


def test_core_import_leaves_the_leaves_alone(tmp_path):
    code = (
        "import sys, adarank_fast; "
        "print([m for m in ('matplotlib', 'typer', 'bitsandbytes', 'accelerate') "
        "if m in sys.modules])"
    )
    assert run(code, tmp_path) == "[]"


def test_the_main_job_needs_none_of_the_optional_packages(tmp_path):
    code = """
import importlib.util, sys

OPTIONAL = ("bitsandbytes", "datasets", "pandas", "torchao", "trl")

class Missing:
    def find_spec(name, *rest):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    None if name.partition(".")[0] in OPTIONAL else find(name, *rest)
)
sys.meta_path.insert(0, Missing)
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import adarank_fast as ada

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
batch = {"input_ids": torch.arange(10).view(2, 5)}
plan = ada.predict_ranks(model.eval(), [batch], 2, trials=1, progress=False)
peft_model = ada.inject(model, plan)
peft_model(**batch, labels=batch["input_ids"]).loss.backward()
print(ada.fusion_report(peft_model).fused_share)
"""
    paths = str(ROOT), str(ROOT / "kernels")
    assert run(code, tmp_path, *paths).splitlines()[-1] == "1.0"


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of what is built: building leaves files behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "adarank_fast", "kernels", "src"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.whl"))


def test_an_editable_install_is_one_folder_of_the_two_packages(source, tmp_path):
    """Type checkers read a path, no import hook; `kernels` and `tests` stay out of reach."""
    code = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    run(code, source)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as made:
        (path,) = (made.read(n).decode().split() for n in made.namelist() if n.endswith(".pth"))
    found = {one.name for one in Path(*path).iterdir() if one.suffix != ".egg-info"}
    assert found == {"adarank_fast", "adarank_kernels"}


def test_the_wheel_has_both_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"adarank_fast", "adarank_kernels"}
    for kind in ("css", "html.jinja", "md.jinja"):
        assert f"adarank_fast/comparison/report.{kind}" in names
    cpp = {
        f"adarank_kernels/runtime/cpp/{name}" for name in ("adarank.cpp", "group.h", "products.h")
    }
    assert {name for name in names if "/cpp/" in name} == cpp
    modules = {
        str(path.relative_to(folder.parent))
        for folder in (ROOT / "adarank_fast", ROOT / "kernels" / "adarank_kernels")
        for path in folder.rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules


def test_the_wheel_works_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import adarank_fast as ada, adarank_kernels, torch; from torch import nn; "
        "model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)); "
        "plan = ada.predict_ranks(model, [{'input': torch.randn(5, 4)}], 1, "
        "target_modules='all-linear', progress=False); "
        "from adarank_kernels.runtime import native; fits = native.operators() is not None; "
        "print(ada.__file__, adarank_kernels.__file__, plan.parameters > 0, fits)"
    )
    out = run(code, empty, str(site)).split()
    assert out[0].startswith(str(site)) and out[1].startswith(str(site))
    assert out[2:] == ["True", "True"]  # the C++ source came along


def test_an_older_python_is_told_which_one_is_needed(tmp_path):
    """By make, in one line, before anything is installed; pip says it by `requires-python`."""
    older = tmp_path / "python3.10"
    code = "import sys; sys.version_info = (3, 10, 13); exec(sys.argv[1])"
    older.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$2"\n')
    older.chmod(0o755)
    command = ["make", f"PYTHON={older}", f"VENV={tmp_path / 'venv'}", "demo"]
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=outside)
    line = result.stderr.splitlines()[0]
    assert result.returncode and result.stdout == "" and not (tmp_path / "venv").exists()
    assert line.startswith("adarank-fast needs Python 3.11 or newer") and "is 3.10" in line
    assert '\nrequires-python = ">=3.11"\n' in (ROOT / "pyproject.toml").read_text()
