"""Builds the C++ operators once, on first use, and loads them.

A library lies in the user's cache under a key of all it was made from: the sources, torch's version
and C++ ABI, the compiler, the options and the CPU's instruction sets. Building happens in a
temporary folder under a lock of the operating system, which a killed builder releases; a rename
makes the library appear whole. Its last bytes are a hash of the others: loading a library that was
cut short would end the process, so it is built again. Where it cannot be built or loaded there is
one warning, and torch's products stand in.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import IO, Any

import torch

try:
    import fcntl
except ImportError:  # Windows, which gets torch's products
    pass

OPTIONS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-w")
TIMEOUT = 300  # seconds for the compiler, and for another process that builds
OPERATORS = (
    *("drop", "shrink", "expand_", "grad_s_", "grad_b", "grad_a", "grad_x_"),
    *(
        "make_group",
        "free_group",
        "group_linear",
        "group_forward",
        "group_backward",
        "philox",
        "knows",
    ),
)

SOURCES = [
    Path(__file__).with_name("cpp") / name for name in ("adarank.cpp", "group.h", "products.h")
]

_lock = threading.Lock()
_loaded: bool | None = None


def cache_folder() -> Path:
    """ADARANK_CACHE, or adarank-fast in the user's cache."""
    named = os.environ.get("ADARANK_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "adarank-fast" / "native"


def operators() -> Any:
    """`torch.ops.adarank` with the C++ operators, built and loaded if need be; None without them.

    The result is kept for the process: a compiler that is installed later changes nothing.
    ADARANK_NATIVE=0 leaves torch's products in place.
    """
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return torch.ops.adarank if _loaded else None


def is_loaded() -> bool:
    """Whether the operators are there by now; builds nothing."""
    return bool(_loaded)


def _load() -> bool:
    if os.environ.get("ADARANK_NATIVE") == "0" or not sys.platform.startswith("linux"):
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        if not _are_registered():  # a second library of this name would end the process
            torch.ops.load_library(str(_built()))
        if not _are_registered():
            raise RuntimeError("the library lacks operators")
        return True
    except Exception as error:  # no compiler, a full disk, a library without symbols, ...
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        warnings.warn(
            f"adarank-fast: no C++ products, torch's slower ones are used ({said:.200}); install "
            "g++, or set ADARANK_CACHE to a folder that can be written",
            stacklevel=2,
        )
        return False


def _are_registered() -> bool:
    return all(hasattr(torch.ops.adarank, name) for name in OPERATORS)


def _built() -> Path:
    """The library, built now or before."""
    compiler = _compiler()
    folder = cache_folder()
    path = folder / f"adarank-{_key(compiler)}.so"
    if _is_whole(path):
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(path.with_suffix(".lock"), "w") as lock:
        _wait_for(lock)
        if not _is_whole(path):
            _build(compiler, path)
    return path


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def _wait_for(lock: IO[str]) -> None:
    """Takes the lock, which a builder holds as long as it lives; waits no longer than TIMEOUT."""
    start = time.monotonic()
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - start > TIMEOUT:
                raise TimeoutError("another process has been building for too long") from None
            time.sleep(0.1)


def _build(compiler: str, path: Path) -> None:
    print(
        "adarank-fast: building its C++ products, once (about 20 s) ...",
        file=sys.stderr,
        flush=True,
    )
    start = time.monotonic()
    libraries = Path(torch.__file__).parent / "lib"
    prefix = f".build-{path.stem}-"
    for left in path.parent.glob(f"{prefix}*"):  # by a builder that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
        compiled, built = Path(folder, "adarank.o"), Path(folder, path.name)
        _run([compiler, *_options(), "-c", str(SOURCES[0]), "-o", str(compiled)])
        # Linked without -fopenmp, which would bring the compiler's own OpenMP library along, and
        # its threads: torch's, whatever it is called, is in the process.
        _run(
            [compiler, "-shared", str(compiled), "-o", str(built)]
            + [f"-L{libraries}", "-lc10", "-ltorch_cpu"]
        )
        digest = hashlib.sha256(built.read_bytes()).digest()
        with open(built, "ab") as file:
            file.write(digest)
        os.replace(built, path)
    print(f"adarank-fast: built in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        raise RuntimeError(f"{command[0]}: {(errors or ['it failed'])[0]}")


def _options() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    abi = int(torch.compiled_with_cxx11_abi())
    return [*OPTIONS, f"-I{include}", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++"):
        if name and (path := shutil.which(name)):
            return path
    raise FileNotFoundError("no C++ compiler found")


def _key(compiler: str) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=30).stdout
    for part in (
        f"{torch.__version__} {torch.version.git_version}".encode(),
        " ".join(_options()).encode(),
        compiler.encode(),
        version,
        _cpu_flags().encode(),
        *(source.read_bytes() for source in SOURCES),
    ):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("flags")), platform.processor())
