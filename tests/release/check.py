"""What `make release-check` does with a wheel and an sdist that `python -m build` made.

    python -m tests.release.check build/release
    python -m tests.release.check build/release --python python3.12 --python python3.13

Each goes into an empty environment outside the repository and does a small job there. Without
`--python` it is the running Python's, and the dependencies are those of the running environment.
With it, everything is installed from the index: some gigabytes an environment.
"""

from __future__ import annotations

import argparse
import site
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

SMOKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
import adarank_fast as ada, adarank_kernels
from adarank_kernels.runtime import native

assert all(m.__file__.startswith(sys.prefix) for m in (ada, adarank_kernels)), ada.__file__
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
batch = {"input_ids": torch.arange(10).view(2, 5)}
plan = ada.predict_ranks(model, [batch], 2, output="logits", trials=1, progress=False)
peft_model = ada.inject(model, plan, example=batch)
peft_model(**batch, labels=batch["input_ids"]).loss.backward()
assert ada.fusion_report(peft_model).fused_share == 1.0
native.operators()  # built of the C++ source that came along, where there is a compiler
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, adarank-fast {ada.__version__}")
"""
SOURCES = ("runtime/cpp/adarank.cpp", "runtime/cpp/group.h", "runtime/cpp/products.h", "py.typed")


def check_contents(wheel: Path, sdist: Path) -> None:
    """Both are pure Python with the C++ source inside, and nothing that was compiled."""
    assert wheel.name.endswith("-py3-none-any.whl"), wheel.name
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as source:
        for names in (archive.namelist(), source.getnames()):
            for end in SOURCES:
                assert any(name.endswith(f"adarank_kernels/{end}") for name in names), end
            built = [name for name in names if name.endswith((".so", ".o", ".pyc"))]
            assert not built, built


def run(*command: str | Path, folder: Path) -> None:
    """Print what it prints; of what it says on stderr, only what a failure needs."""
    parts = [str(part) for part in command]
    done = subprocess.run(parts, cwd=folder, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(parts[:4])} ...: status {done.returncode}\n{done.stderr}")


def check_install(package: Path, python: str | None) -> None:
    """Install `package` into an environment of its own and use it from an empty folder."""
    with tempfile.TemporaryDirectory() as name:
        folder, home = Path(name, "empty"), Path(name, "environment")
        folder.mkdir()
        if python is None:
            venv.create(home, with_pip=False)
            inside = home / "bin" / "python"
            (packages,) = home.glob("lib/python*/site-packages")
            # the tests' environment, but for its editable install of this project
            paths = [p for p in [*site.getsitepackages(), *sys.path] if p.endswith("site-packages")]
            (packages / "base.pth").write_text("\n".join(dict.fromkeys(paths)))
            options = ["--no-deps", "--no-build-isolation"]
        else:
            run(python, "-m", "venv", home, folder=folder)
            inside, options = home / "bin" / "python", []
        quiet = ["--quiet", "--disable-pip-version-check"]
        install = [inside, "-m", "pip", "install", *quiet, *options, "--force-reinstall", package]
        run(*install, folder=folder)
        run(inside, "-c", SMOKE, folder=folder)
        run(home / "bin" / "adarank", "--version", folder=folder)
        assert not list(folder.iterdir()), "the smoke test left files behind"
    print(f"{package.name}: works in an empty environment")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", action="append", help="install everything for this Python")
    arguments = parser.parse_args()
    (wheel,), (sdist,) = (arguments.folder.glob(end) for end in ("*.whl", "*.tar.gz"))
    check_contents(wheel.resolve(), sdist.resolve())
    for python in arguments.python or [None]:
        check_install(wheel.resolve(), python)
        if python is None:
            check_install(sdist.resolve(), python)


if __name__ == "__main__":
    main()
