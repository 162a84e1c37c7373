"""PEFT's own tests, plain and accelerated: what passes plain must pass with fused layers.

    make peft-suite                              fetches the sdist of the installed PEFT
    make peft-suite PEFT_TESTS=folder            takes a folder with PEFT's tests instead
    make peft-suite ARGS="--only mixed -n 2"     some of the files; two processes

PEFT's code is fetched into a temporary folder and never kept. Offline, tests that need a model of
the hub fail plain: they are listed, not counted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FILES = ("custom_models", "initialization", "mixed", "lora_variants", "low_level_api")
NOT_COUNTED = ("adapters disabled", "merged", "extra arguments")  # disabled, merged, per sample
LEFT_TO_PEFT = ("a LoRA variant", "DoRA ", "several active", "base layer is a")


def fetch(folder: Path) -> Path:
    """The tests in the sdist of the installed PEFT.

    Raises:
        SystemExit: the index does not serve it, or it has no tests.
    """
    version = importlib.metadata.version("peft")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    download += ["--no-binary", "peft", f"peft=={version}", "--dest", str(folder)]
    subprocess.run(download)
    for archive in folder.glob("peft-*.tar.gz"):
        shutil.unpack_archive(archive, folder, filter="data")
    for tests in folder.glob("peft-*/tests"):
        return tests
    raise SystemExit(
        f"the package index does not serve the source of peft {version} with its tests; give a "
        "folder with them: make peft-suite PEFT_TESTS=folder"
    )


def run(tests: Path, how: str, options: argparse.Namespace, results: Path) -> dict[str, dict]:
    """One session; what the plugin wrote, summed over processes."""
    folder = results / how
    folder.mkdir()
    files = [f"tests/test_{name}.py" for name in options.only]
    command = [sys.executable, "-m", "pytest", "-p", "accelerated", "-q", "--tb=line"]
    command += ["-p", "no:cacheprovider", "-p", "no:warnings", "-W", "ignore"]
    command += ["--import-mode=prepend", "-n", str(options.processes), *files]
    command += ["-k", options.expression] if options.expression else []
    environment = {
        **os.environ,
        "PEFT_SUITE": how,
        "PEFT_SUITE_FOLDER": str(folder),
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, ROOT, ROOT / "kernels"))),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (results / f"{how}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=tests.parent, env=environment, stdout=log, stderr=log)
    total: dict[str, dict] = {"counts": Counter(), "reasons": Counter(), "outcomes": {}}
    for file in folder.glob("*.json"):
        for key, found in json.loads(file.read_text(encoding="utf-8")).items():
            total[key].update(found)
    if not total["outcomes"]:
        raise SystemExit((results / f"{how}.log").read_text(encoding="utf-8")[-3000:])
    return total


def report(plain: dict[str, dict], fused: dict[str, dict]) -> int:
    """Print what was found; 1 if a test passes plain only, or if no layer was swapped."""
    outcomes, accelerated = plain["outcomes"], fused["outcomes"]
    failed = sorted(name for name in outcomes if outcomes[name] == "failed")
    passed = sorted(name for name in outcomes if outcomes[name] == "passed")
    broken = [name for name in passed if accelerated.get(name) != "passed"]
    if failed:
        print("Fail plain (not counted):", *failed, sep="\n  ")
    print(f"plain: {dict(Counter(outcomes.values()))}")
    print(f"accelerated: {dict(Counter(accelerated.values()))}")
    print(f"pass plain, fail accelerated: {len(broken)}", *broken, sep="\n  ")
    calls, counted, covered = (fused["counts"].get("fused", 0),) * 3
    for reason, count in fused["reasons"].most_common():
        kind = "not counted"
        if not reason.startswith(NOT_COUNTED):
            counted += count
            kind = "left to PEFT by design"
            if not reason.startswith(LEFT_TO_PEFT):
                covered += count
                kind = "should be fused"
        print(f"  {count:6d} calls through PEFT: {reason} ({kind})")
    swapped = fused["counts"].get("swapped", 0)
    print(f"{swapped} layers swapped; fused calls: {calls}")
    if counted:
        print(f"  {100 * calls / counted:.1f}% of those not disabled, merged or per sample")
        print(f"  {100 * calls / max(covered, 1):.1f}% of those of kinds that have a fused form")
    if not swapped:
        print("nothing was accelerated")
    return int(bool(broken) or not swapped)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tests", type=Path, help="a folder with PEFT's tests; default: fetched")
    parser.add_argument("--only", nargs="+", default=list(FILES), help="mixed: tests/test_mixed.py")
    parser.add_argument("-n", type=int, default=0, dest="processes", help="of pytest-xdist")
    parser.add_argument("-k", dest="expression", help="as pytest's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        given = options.tests or fetch(work)
        tests = work / "suite" / "tests"
        shutil.copytree(given, tests)
        for name in ("__init__.py", "conftest.py"):  # an sdist leaves them out
            (tests / name).touch()
        results = work / "results"
        results.mkdir()
        found = [run(tests, how, options, results) for how in ("plain", "accelerated")]
    return report(*found)


if __name__ == "__main__":
    raise SystemExit(main())
