"""Mutation tests: one operator, condition or constant of the source is changed; does a test fail?

    make mutants ARGS="--only allocation --minutes 5"

Each mutant's tests run in a fork of a process that has torch and Triton imported, in a copy of the
repository. Figures go to bench/results/mutants.json: of every part how many mutants there are, how
many were tried (drawn with a seed) and killed, and the survivors. Why one of them changes nothing
that a test could see is written there by hand, under "equivalent"; a later run keeps it.

Left out are annotations, decorators, messages, assertions, tuned sizes, and the kernels' own checks
on a device, which are tests themselves.
"""

from __future__ import annotations

import argparse
import ast
import gc
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KERNELS = "kernels/adarank_kernels"
WARM = ("torch", "numpy", "scipy.special", "transformers", "peft", "hypothesis", "pytest", "triton")
SELF_CHECKS = ("_check", "_each_dtype", "_exact", "_problem", "_RANKS", "register")
SIZES = (
    *("SHRINK", "EXPAND", "DROP", "FILL", "PAIRS", "WORTH_BUILDING", "COUNTERS_PER_CHUNK"),
    *("ROWS_PER_CHUNK", "LOGITS_BYTES", "CACHE_BYTES", "ROWS", "LARGE", "OUTPUTS", "GPU_BYTES"),
    *("GPU_LEAST_BYTES", "GPU_SHARE", "GPU_OUTPUTS", "chunk_tokens", "held_copies", "few"),
)


@dataclass(frozen=True)
class Part:
    """Files that are mutated, and the tests that should notice."""

    files: tuple[str, ...]
    tests: tuple[str, ...]
    interpreted: bool = False


PARTS = {
    "allocation": Part(
        ("adarank_fast/plan/allocation.py", "adarank_fast/plan/budget.py"),
        ("tests/plan/test_allocation.py", "tests/plan/test_allocation_properties.py"),
    ),
    "philox": Part(
        tuple(f"{KERNELS}/random/{name}.py" for name in ("philox", "reference", "words")),
        ("tests/kernels/test_philox.py",),
    ),
    "philox-triton": Part(
        (f"{KERNELS}/random/triton.py",), ("tests/interpreter/test_philox_kernels.py",), True
    ),
    "lora-triton": Part(
        tuple(f"{KERNELS}/lora/{name}.py" for name in ("triton_kernels", "triton_launch"))
        + (f"{KERNELS}/lora/backends/triton.py",),
        ("tests/interpreter/test_lora_kernels.py",),
        True,
    ),
    "lora-cpu": Part(
        tuple(
            f"{KERNELS}/lora/{name}.py" for name in ("backends/cpu", "backends/torch", "dropout")
        ),
        (
            "tests/kernels/test_grouped_lora.py",
            "tests/kernels/test_product_schemas.py",
            "tests/kernels/test_products.py",
        ),
    ),
    "disagreement-triton": Part(
        (f"{KERNELS}/disagreement/triton.py",),
        ("tests/interpreter/test_disagreement_kernels.py",),
        True,
    ),
    "disagreement": Part(
        tuple(f"{KERNELS}/disagreement/{name}.py" for name in ("op", "metrics")),
        ("tests/kernels/test_disagreement.py",),
    ),
}


@dataclass(frozen=True)
class Mutant:
    """`text` with bytes [start, stop) replaced."""

    file: str
    start: int
    stop: int
    new: str
    line: int

    def apply(self, text: bytes) -> bytes:
        return text[: self.start] + self.new.encode() + text[self.stop :]

    def shown(self, text: bytes) -> dict[str, Any]:
        before, after = (t.decode().splitlines()[self.line - 1] for t in (text, self.apply(text)))
        return {"line": self.line, "before": before.strip(), "after": after.strip()}


SWAPS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "//"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"), ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.BitXor: ("^", "&"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip


class Finder:
    """All mutants of one file, by the positions of its syntax tree."""

    def __init__(self, file: str, text: bytes) -> None:
        self.file, self.text = file, text
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def begin(self, node: Any) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def end(self, node: Any) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def replaced(self, start: int, stop: int, new: str) -> Mutant:
        return Mutant(self.file, start, stop, new, self.text.count(b"\n", 0, start) + 1)

    def swapped(self, op: Any, start: int, stop: int) -> Iterator[Mutant]:
        """The operator that stands between `start` and `stop`, in place of it another."""
        if type(op) in SWAPS:
            old, new = SWAPS[type(op)]
            at = self.text.index(old.encode(), start, stop)
            yield self.replaced(at, at + len(old), new)

    def negated(self, test: Any) -> Iterator[Mutant]:
        if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            old = self.text[self.begin(test) : self.end(test)].decode()
            yield self.replaced(self.begin(test), self.end(test), f"(not ({old}))")

    def walk(self, node: Any) -> Iterator[Mutant]:
        names = [getattr(node, "name", "")]
        if isinstance(node, ast.Assign):
            names = [n.id for target in node.targets for n in ast.walk(target) if hasattr(n, "id")]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            names = [getattr(node.value.func, "id", "")]
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
            return
        if any(name.startswith(SELF_CHECKS) or name.lstrip("_") in SIZES for name in names):
            return
        yield from self.of(node)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.walk(child)

    def of(self, node: Any) -> Iterator[Mutant]:
        match node:
            case ast.BinOp():
                yield from self.swapped(node.op, self.end(node.left), self.begin(node.right))
            case ast.AugAssign():
                yield from self.swapped(node.op, self.end(node.target), self.begin(node.value))
            case ast.Compare():
                sides = [node.left, *node.comparators]
                for op, left, right in zip(node.ops, sides, sides[1:], strict=False):
                    yield from self.swapped(op, self.end(left), self.begin(right))
            case ast.BoolOp():
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield from self.swapped(node.op, self.end(left), self.begin(right))
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                length = 3 if isinstance(node.op, ast.Not) else 1
                yield self.replaced(self.begin(node), self.begin(node) + length, "")
            case ast.If() | ast.IfExp() | ast.While():
                yield from self.negated(node.test)
            case ast.Constant(value=bool()):
                yield self.replaced(self.begin(node), self.end(node), str(not node.value))
            case ast.Constant(value=int()):
                for more in (1, -1):
                    new = str(node.value + more)
                    yield self.replaced(self.begin(node), self.end(node), new)
            case ast.Constant(value=float()):
                yield self.replaced(self.begin(node), self.end(node), repr(node.value + 1))


def mutants(file: str, root: Path = ROOT) -> list[Mutant]:
    finder = Finder(file, (root / file).read_bytes())
    return list(finder.walk(ast.parse(finder.text)))


def run_tests(tests: tuple[str, ...]) -> None:
    """In a process of its own: ends with pytest's status."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    import hypothesis
    import pytest

    # a failure is enough: not its smallest example
    hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.generate])
    options = "-x -q -p no:cacheprovider -p _hypothesis_pytestplugin --hypothesis-profile=mutants"
    os._exit(pytest.main([*options.split(), *tests]))


def outcome(tests: tuple[str, ...], limit: float) -> str:
    """ "survived", "killed" or "timed out": after `limit` seconds."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tests,))
    process.start()
    process.join(limit)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        return "timed out"
    return "killed" if process.exitcode else "survived"


def try_part(name: str, seed: int, minutes: float, root: Path) -> dict[str, Any]:
    """Try the part's mutants, drawn in random order, in the copy at `root`."""
    part = PARTS[name]
    if part.interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    for module in WARM:
        __import__(module)
    gc.freeze()  # the forks share what is imported
    started = time.monotonic()
    if (clean := outcome(part.tests, 900)) != "survived":
        raise SystemExit(f"{name}: its tests do not pass unmutated ({clean})")
    seconds = time.monotonic() - started
    until = time.monotonic() + 60 * minutes
    everything = [m for file in part.files for m in mutants(file, root)]
    drawn = random.Random(seed).sample(everything, len(everything))
    counts = dict.fromkeys(("killed", "timed out", "survived"), 0)
    survivors = []
    for mutant in drawn:
        if time.monotonic() > until:
            break
        path = root / mutant.file
        text = path.read_bytes()
        path.write_bytes(mutant.apply(text))
        found = outcome(part.tests, 30 + 4 * seconds)
        path.write_bytes(text)
        counts[found] += 1
        if found == "survived":
            survivors.append({"file": mutant.file, **mutant.shown(text)})
            print(f"  {name}: survived {survivors[-1]}", flush=True)
    tried = sum(counts.values())
    return {
        "files": part.files,
        "tests": part.tests,
        "mutants": len(everything),
        "tried": tried,
        "killed": counts["killed"] + counts["timed out"],
        "of which timed out": counts["timed out"],
        "seed": seed,
        "seconds_of_tests": round(seconds, 1),
        "survivors": survivors,
    }


def record(name: str, row: dict[str, Any]) -> None:
    """Write the row, with the explanations of the last one's survivors."""
    from bench.results_file import read_results, write_results

    known = {
        (s["file"], s["before"], s["after"]): s["equivalent"]
        for s in read_results("mutants").get(name, {}).get("survivors", [])
        if "equivalent" in s
    }
    for survivor in row["survivors"]:
        key = survivor["file"], survivor["before"], survivor["after"]
        if key in known:
            survivor["equivalent"] = known[key]
    write_results("mutants", {name: row})


def one_part(name: str, seed: int, minutes: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        leave = shutil.ignore_patterns("__pycache__", "results")
        for part in ("adarank_fast", "kernels", "tests", "bench"):
            shutil.copytree(ROOT / part, root / part, ignore=leave)
        shutil.copy(ROOT / "pyproject.toml", root)
        os.chdir(root)
        sys.path[:0] = [folder, str(root / "kernels")]
        row = try_part(name, seed, minutes, root)
    os.chdir(ROOT)
    share = row["killed"] / max(row["tried"], 1)
    print(
        f"{name}: {row['killed']} of {row['tried']} killed ({share:.1%}), {row['mutants']} in all"
    )
    record(name, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="this part")
    parser.add_argument("--minutes", type=float, default=15.0, help="at most, a part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="count the mutants, run nothing")
    options = parser.parse_args()
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in options.only or PARTS:
        if options.list:
            print(name, {file: len(mutants(file)) for file in PARTS[name].files})
            continue
        process = multiprocessing.get_context("fork").Process(
            target=one_part, args=(name, options.seed, options.minutes)
        )
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
