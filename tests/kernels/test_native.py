"""Building and loading the C++ operators, in processes and caches of their own."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from adarank_kernels.runtime import native

ROOT = Path(__file__).parents[2]

# Four threads at once ask for the operators, and whatever they get must compute.
WORKER = """
import json, sys, threading, warnings
from pathlib import Path
import torch
from adarank_kernels import lora_linear, philox_normal, philox_normal_ref
from adarank_kernels.runtime import native

start, wrong = threading.Barrier(4), []

def work(dtype):
    try:
        start.wait()
        generator = torch.Generator().manual_seed(1)
        sizes = (9, 24), (7, 24), (3, 24), (7, 3)
        x, W, A, B = (torch.randn(*size, generator=generator) for size in sizes)
        x, W, A, B = (t.to(dtype).requires_grad_(t is not W) for t in (x, W, A, B))
        y = lora_linear(x, W, A, B, 2.0)
        ref = x @ W.t() + 2 * (x @ A.t()) @ B.t()
        ours = torch.autograd.grad(y.sum(), [x, A, B])
        refs = torch.autograd.grad(ref.sum(), [x, A, B])
        X, W64, A64, B64 = (t.detach().double().requires_grad_() for t in (x, W, A, B))
        exact = X @ W64.t() + 2 * (X @ A64.t()) @ B64.t()
        exacts = torch.autograd.grad(exact.sum(), [X, A64, B64])
        for a, b, c in zip((y, *ours), (ref, *refs), (exact, *exacts)):
            assert (a - c).norm() <= 2 * (b - c).norm() + 1e-6
    except BaseException as error:
        wrong.append(repr(error))

with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    dtypes = [torch.float32, torch.bfloat16] * 2
    threads = [threading.Thread(target=work, args=(dtype,)) for dtype in dtypes]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    normals = philox_normal((1 << 16,), 3)
    torch.testing.assert_close(normals[:99], philox_normal_ref((99,), 3), atol=5e-6, rtol=0)
maps = Path("/proc/self/maps").read_text().splitlines()
print(json.dumps({
    "wrong": wrong,
    "loaded": native.is_loaded(),
    "warnings": [str(w.message) for w in found if "adarank-fast" in str(w.message)],
    "openmp": sorted({line.split()[-1] for line in maps if "gomp" in line or "iomp" in line}),
}))
"""

# Copies a library where a compiler would put one, and notes that it was called.
STUB = """#!/bin/sh
if [ "$1" = --version ]; then echo stub; exit 0; fi
echo "$*" >> "$STUB_LOG"
sleep "${STUB_SECONDS:-0}"
while [ "$1" != -o ]; do shift; done
if [ -n "$STUB_FAILS" ]; then echo "error: no luck" >&2; exit 1; fi
case "$2" in *.o) : > "$2" ;; *) cp "$STUB_LIBRARY" "$2" ;; esac
"""


@pytest.fixture(scope="module")
def library() -> Path:
    """The one that the whole suite uses, which is built for real."""
    if native.operators() is None:
        pytest.skip("no C++ compiler, or not x86-64 Linux")
    return native._built()


@pytest.fixture
def environment(tmp_path: Path, library: Path) -> dict[str, str]:
    """A cache of its own and a stub for a compiler."""
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return {
        **os.environ,
        "ADARANK_CACHE": str(tmp_path / "cache"),
        "CXX": str(stub),
        "STUB_LIBRARY": str(library),
        "STUB_LOG": str(tmp_path / "log"),
        "PYTHONPATH": str(ROOT / "kernels"),
    }


def start(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    found = json.loads(out.splitlines()[-1])
    assert not found["wrong"]
    return found


def run(environment: dict[str, str], **changed: str) -> dict[str, Any]:
    return result(start({**environment, **changed}))


def calls(environment: dict[str, str]) -> int:
    """How often the stub was called to compile or link."""
    log = Path(environment["STUB_LOG"])
    return len(log.read_text().splitlines()) if log.exists() else 0


def refused(found: dict[str, Any], why: str) -> None:
    assert not found["loaded"]
    (warning,) = found["warnings"]
    assert "torch's slower ones are used" in warning and why in warning


def test_no_compiler(environment: dict[str, str]) -> None:
    environment.pop("CXX")
    refused(run(environment, PATH=""), "no C++ compiler found")


def test_a_compiler_that_fails(environment: dict[str, str]) -> None:
    refused(run(environment, CXX="false"), "it failed")


@pytest.mark.parametrize("cache", ["ADARANK_CACHE", "HOME"])
def test_a_cache_that_cannot_be_written(environment: dict[str, str], cache: str) -> None:
    if cache == "HOME":
        environment.pop("ADARANK_CACHE")
        environment.pop("XDG_CACHE_HOME", None)
    where = {"ADARANK_CACHE": "/dev/null/x", "HOME": "/dev/null"}[cache]
    refused(run(environment, **{cache: where}), "Not a directory")
    assert not calls(environment)


def test_switched_off(environment: dict[str, str]) -> None:
    found = run(environment, ADARANK_NATIVE="0")
    assert not found["loaded"] and not found["warnings"] and not calls(environment)


def test_a_library_that_is_none(environment: dict[str, str], tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(bytes(range(256)) * 16)
    refused(run(environment, STUB_LIBRARY=str(garbage)), "")


def test_a_library_without_the_operators(environment: dict[str, str]) -> None:
    maps = Path("/proc/self/maps").read_text().splitlines()
    other = next(line.split()[-1] for line in maps if "/libm.so" in line or "/libm-" in line)
    refused(run(environment, STUB_LIBRARY=other), "lacks operators")


def test_built_once_and_again_when_damaged(environment: dict[str, str]) -> None:
    found = run(environment)
    assert found["loaded"] and not found["warnings"]
    assert len(found["openmp"]) == 1
    assert calls(environment) == 2  # compiled, linked
    cache = Path(environment["ADARANK_CACHE"])
    (built,) = cache.glob("*.so")
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}
    assert run(environment, STUB_FAILS="yes")["loaded"]  # nothing to do
    assert calls(environment) == 2

    content = built.read_bytes()
    built.write_bytes(b"")
    assert not native._is_whole(built)
    built.write_bytes(content[: len(content) // 2])
    refused(run(environment, STUB_FAILS="yes"), "no luck")
    assert run(environment)["loaded"]
    assert built.read_bytes() == content


def test_two_at_once_build_once(environment: dict[str, str]) -> None:
    both = [start({**environment, "STUB_SECONDS": "1"}) for _ in range(2)]
    for found in map(result, both):
        assert found["loaded"] and not found["warnings"]
    assert calls(environment) == 2


def test_after_a_builder_that_was_killed(environment: dict[str, str]) -> None:
    """Its compiler may still run; its lock and its folder are left behind."""
    killed = start({**environment, "STUB_SECONDS": "100"})
    while not calls(environment):
        assert killed.poll() is None
        time.sleep(0.05)
    cache = Path(environment["ADARANK_CACHE"])
    killed.kill()
    killed.wait()
    (left,) = cache.glob(".build-*")
    other = cache / ".build-another"  # another library's builder: not ours to remove
    other.mkdir()
    try:
        found = run(environment)
        assert found["loaded"] and not found["warnings"]
        assert not left.exists() and other.exists()
    finally:
        os.killpg(killed.pid, signal.SIGKILL)  # the stub
        for stream in (killed.stdout, killed.stderr):
            if stream is not None:
                stream.close()


def test_a_builder_that_is_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "TIMEOUT", 0.2)
    with open(tmp_path / "lock", "w") as held, open(tmp_path / "lock", "w") as lock:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="building for too long"):
            native._wait_for(lock)
        fcntl.flock(held, fcntl.LOCK_UN)
        native._wait_for(lock)


def test_the_library_asks_for_no_openmp_of_its_own(library: Path) -> None:
    """Whatever torch's is called, that one serves: two would mean twice the threads."""
    content = library.read_bytes()
    assert b"GOMP_parallel" in content and b"libgomp.so" not in content
