"""Mutation tests: one operator, condition or constant is changed; does a test fail?

    make mutants ARGS="--only allocation --minutes 5"

Each mutant's tests run in a fork of a process that has torch and Triton imported, in a copy of the
repository. Figures go to bench/results/mutants.json: of every part how many mutants there are, how
many were tried (drawn with a seed) and killed, and the survivors. Why one of them changes nothing
that a test could see, or not here, is written by hand under "note"; a later run keeps it.

Left out are annotations, decorators, messages, assertions, tuned sizes, and the kernels' own checks
on a device, which are tests themselves.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import gc
import json
import multiprocessing
import os
import py_compile
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WARM = ("torch", "numpy", "scipy.special", "transformers", "peft", "hypothesis", "pytest", "triton")
MEMORY = 8 << 30  # bytes a mutant may take
SELF_CHECKS = ("_check", "each_dtype", "_exact", "problem", "_problem", "_RANKS", "register")
SIZES = (
    *("SHRINK", "EXPAND", "DROP", "FILL", "PAIRS", "WORTH_BUILDING", "COUNTERS_PER_CHUNK"),
    *("COUNTERS_ELSEWHERE", "ROWS_PER_CHUNK", "LOGITS_BYTES", "CACHE_BYTES", "ROWS", "LARGE"),
    *("OUTPUTS", "GPU_BYTES", "GPU_LEAST_BYTES", "GPU_SHARE", "GPU_OUTPUTS"),
    *("chunk_tokens", "chunks_at_once", "gpu_bound", "held_copies", "few", "SMALLER", "ON_ROCM"),
)


@dataclass(frozen=True)
class Part:
    """Files that are mutated, and arguments of pytest: quick tests that should notice.

    `interpreted` are those for Triton's interpreter. Others may notice more.
    """

    files: tuple[str, ...]
    tests: tuple[str, ...] = ()
    interpreted: tuple[str, ...] = ()


def kernels(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"kernels/adarank_kernels/{folder}/{name}.py" for name in names)


OPS = [f"tests/kernels/test_disagreement{n}.py" for n in ("_pieces", "")]
PARTS = {
    "allocation": Part(
        ("adarank_fast/plan/allocation.py", "adarank_fast/plan/budget.py"),
        ("tests/plan/test_allocation.py", "tests/plan/test_allocation_properties.py"),
    ),
    "philox": Part(
        kernels("random", "philox", "reference", "words", "triton"),
        ("tests/kernels/test_philox.py",),
        ("tests/interpreter/test_philox_kernels.py",),
    ),
    "lora-triton": Part(
        kernels("lora", "triton_kernels", "triton_launch", "triton_gradients", "backends/triton"),
        ("tests/kernels/test_triton_launch.py",),
        ("tests/interpreter/test_lora_tiles.py",),
    ),
    "lora-cpu": Part(
        kernels("lora", "dropout", "backends/cpu", "backends/torch"),
        (
            "tests/kernels/test_backends.py",
            "tests/kernels/test_philox.py",
            "tests/kernels/test_product_schemas.py",
        ),
    ),
    "disagreement-triton": Part(
        kernels("disagreement", "triton"),
        interpreted=("tests/interpreter/test_disagreement_tiles.py",),
    ),
    "disagreement": Part(
        kernels("disagreement", "op", "metrics"),
        (*OPS, "-k", "not shape2"),  # one large head
        (
            "tests/interpreter/test_disagreement_tiles.py::test_logits_relative_to_row_0",
            "tests/interpreter/test_disagreement_tiles.py::test_sizes",
        ),
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
            if isinstance(node, ast.ClassDef) and field == "keywords":
                continue  # total=False of a TypedDict
            if isinstance(node, ast.keyword) and node.arg == "strict":
                continue  # of zip: an assertion
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
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    import hypothesis
    import pytest

    # a failure is enough: not its smallest example, nor what the two sides of an assertion were
    hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.generate])
    options = "-x -q --assert=plain -p no:cacheprovider -p _hypothesis_pytestplugin"
    os._exit(pytest.main([*options.split(), "--hypothesis-profile=mutants", *tests]))


def outcome(tests: tuple[str, ...], limit: float) -> str:
    """ "survived", "killed" or "timed out": after `limit` seconds. In a warm process."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tests,))
    process.start()
    process.join(limit)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        return "timed out"
    return "killed" if process.exitcode else "survived"


def warm(interpreted: bool) -> None:
    """Import, once, what no mutant changes: the forks share it."""
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    for module in WARM:
        __import__(module)
    gc.freeze()


class Judge:
    """A warm process, whose working folder is the copy, and the tests that it runs in forks."""

    def __init__(self, tests: tuple[str, ...], interpreted: bool) -> None:
        fork = multiprocessing.get_context("fork")
        self.tests = tests
        self.pool = ProcessPoolExecutor(1, fork, warm, (interpreted,))
        self.pool.submit(os.getpid).result()
        started = time.monotonic()
        if (clean := self.outcome(900)) != "survived":
            raise RuntimeError(f"{tests} do not pass unmutated: {clean}")
        self.seconds = time.monotonic() - started

    def outcome(self, limit: float | None = None) -> str:
        limit = 10 + 3 * self.seconds if limit is None else limit
        return self.pool.submit(outcome, self.tests, limit).result()


def judged(mutant: Mutant, judges: list[Judge]) -> str:
    """What the first judge to notice it found, or "survived"."""
    path = Path(mutant.file)
    text = path.read_bytes()
    path.write_bytes(mutant.apply(text))
    try:
        found = (judge.outcome() for judge in judges)
        return next((what for what in found if what != "survived"), "survived")
    finally:
        path.write_bytes(text)


def try_part(part: Part, seed: int, minutes: float, last: dict[str, Any]) -> dict[str, Any]:
    """The part's mutants in random order: all the tests for each, the interpreted ones last.

    After a `last` run, of the same files, its survivors come first; what it killed stays killed.
    """
    everything = [m for file in part.files for m in mutants(file, Path())]
    drawn = random.Random(seed).sample(everything, len(everything))
    texts = {file: Path(file).read_bytes() for file in part.files}
    alive = [{key: s[key] for key in ("line", "before", "after")} for s in last["survivors"]]
    done = last["tried"]
    again = [m for m in drawn[:done] if m.shown(texts[m.file]) in alive]
    if done and (len(again) != len(alive) or [last["mutants"], last["seed"]] != [len(drawn), seed]):
        raise RuntimeError("the last run was of other files or another seed; leave --more out")
    drawn = again + drawn[done:]
    judges = [
        Judge(tests, interpreted)
        for tests, interpreted in ((part.tests, False), (part.interpreted, True))
        if tests
    ]
    started = time.monotonic()
    found: list[str] = []
    for mutant in drawn:
        if len(found) >= len(again) and time.monotonic() - started > 60 * minutes:
            break
        found.append(judged(mutant, judges))
        print(".!t"[("killed", "survived", "timed out").index(found[-1])], end="", flush=True)
    print(flush=True)
    seconds = time.monotonic() - started
    for judge in judges:
        judge.pool.shutdown()
    survivors = [m for m, what in zip(drawn, found, strict=False) if what == "survived"]
    tried = done - len(again) + len(found)
    return {
        "files": part.files,
        "tests": part.tests + part.interpreted,
        "mutants": len(everything),
        "tried": tried,
        "killed": tried - len(survivors),
        "of which timed out": last["of which timed out"] + found.count("timed out"),
        "seed": seed,
        "seconds_of_tests": round(sum(judge.seconds for judge in judges), 1),
        "seconds_a_mutant": round(seconds / max(len(found), 1), 1),
        "survivors": sorted(
            [{"file": m.file, **m.shown(texts[m.file])} for m in survivors],
            key=lambda survivor: (survivor["file"], survivor["line"]),
        ),
    }


def record(name: str, row: dict[str, Any]) -> None:
    """Write the row, with the explanations of the last one's survivors."""
    from bench.results_file import read_results, write_results

    known = {
        (s["file"], s["before"], s["after"]): s["note"]
        for s in read_results("mutants").get(name, {}).get("survivors", [])
        if "note" in s
    }
    for survivor in row["survivors"]:
        key = survivor["file"], survivor["before"], survivor["after"]
        if key in known:
            survivor["note"] = known[key]
    write_results("mutants", {name: row})


def one_part(name: str, seed: int, minutes: float, more: bool) -> None:
    last: dict[str, Any] = {"tried": 0, "of which timed out": 0, "survivors": []}
    if more:  # without an import: forks must import the mutated packages themselves
        last = json.loads((ROOT / "bench/results/mutants.json").read_text()).get(name, last)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        leave = shutil.ignore_patterns("__pycache__", "results")
        for part in ("adarank_fast", "kernels", "tests", "bench"):
            shutil.copytree(ROOT / part, root / part, ignore=leave)
        shutil.copy(ROOT / "pyproject.toml", root)
        # bytecode that is valid as long as the text is: of all but the file that is mutated
        by_text = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(root, quiet=2, invalidation_mode=by_text)
        os.chdir(root)
        sys.path[:0] = [folder, str(root / "kernels")]
        row = try_part(PARTS[name], seed, minutes, last)
    os.chdir(ROOT)
    share = row["killed"] / max(row["tried"], 1)
    print(
        f"{name}: {row['killed']} of {row['tried']} killed ({share:.1%}), {row['mutants']} in all"
    )
    record(name, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="this part")
    parser.add_argument("--minutes", type=float, default=15.0, help="at most, for each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", action="store_true", help="go on, survivors first")
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
            target=one_part, args=(name, options.seed, options.minutes, options.more)
        )
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
