"""PEFT's own tests: what passes plain must pass with fused layers, and with graphs.

    make peft-suite                              fetches the sdist of the installed PEFT
    make peft-suite PEFT_TESTS=folder            takes a folder with PEFT's tests instead
    make peft-suite ARGS="--only mixed -n 2"     some of the files; two processes
    make peft-suite ARGS="--how graphed"         fused layers, gated MLPs and graphs, beside plain

PEFT's code is fetched into a temporary folder and never kept. Models that it takes from the hub are
random ones (`hub.py`); tests that need others fail plain offline: they are listed, not counted.
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

from tests.peft_suite.hub import fill

HERE = Path(__file__).resolve().parent
ADAPTERS = HERE.parent / "adapters"  # the stand-in for CUDA graphs
ROOT = HERE.parent.parent
FILES = (
    "custom_models", "initialization", "mixed", "lora_variants", "low_level_api",
    "decoder_models", "encoder_decoder_models", "feature_extraction_models",
)  # fmt: skip
HOWS = ("accelerated", "graphed", "recorded")
NOT_COUNTED = ("adapters disabled", "merged", "extra arguments", "refused")
LEFT_TO_PEFT = ("a LoRA variant", "BD-LoRA with", "DoRA ", "several active", "base layer is a")


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


def run(tests: Path, how: str, options: argparse.Namespace, work: Path) -> dict[str, dict]:
    """One session; what the plugin wrote, summed over processes."""
    folder = work / how
    folder.mkdir()
    files = [f"tests/test_{name}.py" for name in options.only]
    command = [sys.executable, "-m", "pytest", "-p", "prepared", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-p", "no:warnings", "-W", "ignore"]
    command += ["--import-mode=prepend", "-n", str(options.processes), *files]
    command += ["-k", options.expression] if options.expression else []
    environment = {
        **os.environ,
        "PEFT_SUITE": how,
        "PEFT_SUITE_FOLDER": str(folder),
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, ADAPTERS, ROOT, ROOT / "kernels"))),
        "HF_HUB_CACHE": str(work / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    logs = options.logs or work
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{how}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=tests.parent, env=environment, stdout=log, stderr=log)
    total: dict[str, dict] = {
        "counts": Counter(), "reasons": Counter(), "eager": Counter(), "outcomes": {},
    }  # fmt: skip
    for file in folder.glob("*.json"):
        for key, found in json.loads(file.read_text(encoding="utf-8")).items():
            total[key].update(found)
    if not total["outcomes"]:
        raise SystemExit((logs / f"{how}.log").read_text(encoding="utf-8")[-3000:])
    return total


def report_plain(outcomes: dict[str, str]) -> None:
    failed = sorted(name for name in outcomes if outcomes[name] == "failed")
    if failed:
        print("Fail plain (not counted):", *failed, sep="\n  ")
    print(f"plain: {dict(Counter(outcomes.values()))}")


def report(plain: dict[str, str], how: str, found: dict[str, dict]) -> bool:
    """Print what was found; whether nothing passes plain only, and whether something was done."""
    outcomes, counts = found["outcomes"], found["counts"]
    passed = sorted(name for name in plain if plain[name] == "passed")
    broken = [name for name in passed if outcomes.get(name) != "passed"]
    print(f"\n{how}: {dict(Counter(outcomes.values()))}")
    print(f"pass plain, fail {how}: {len(broken)}", *broken, sep="\n  ")
    report_fused(counts, found["reasons"])
    if how != "accelerated":
        report_graphs(counts, found["eager"])
    done = "swapped" if how == "accelerated" else "replays"
    if not counts.get(done):
        print(f"nothing was {how}")
    return not broken and bool(counts.get(done))


def report_fused(counts: dict[str, int], reasons: Counter[str]) -> None:
    calls, counted, covered = (counts.get("fused", 0),) * 3
    for reason, count in reasons.most_common():
        kind = "not counted"
        if not reason.startswith(NOT_COUNTED):
            counted += count
            kind = "left to PEFT by design"
            if not reason.startswith(LEFT_TO_PEFT):
                covered += count
                kind = "should be fused"
        print(f"  {count:6d} calls through PEFT: {reason} ({kind})")
    print(f"{counts.get('swapped', 0)} layers swapped; fused calls: {calls}")
    if counted:
        print(f"  {100 * calls / counted:.1f}% of those not disabled, merged or per sample")
        print(f"  {100 * calls / max(covered, 1):.1f}% of those of kinds that have a fused form")


def report_graphs(counts: dict[str, int], eager: Counter[str]) -> None:
    for reason, count in eager.most_common():
        print(f"  {count:6d} without graphs: {reason}")
    names = ("models by blocks", "models as a whole", "captures", "replays", "owned MLPs")
    print(", ".join(f"{counts.get(name, 0)} {name}" for name in names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tests", type=Path, help="a folder with PEFT's tests; default: fetched")
    parser.add_argument("--only", nargs="+", default=list(FILES), help="mixed: tests/test_mixed.py")
    parser.add_argument("--how", nargs="+", choices=HOWS, default=list(HOWS), help="beside plain")
    parser.add_argument("--logs", type=Path, help="a folder for what pytest prints")
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
        fill(work / "hub")
        plain = run(tests, "plain", options, work)["outcomes"]
        found = {how: run(tests, how, options, work) for how in options.how}
    report_plain(plain)
    return int(not all([report(plain, how, each) for how, each in found.items()]))


if __name__ == "__main__":
    raise SystemExit(main())
