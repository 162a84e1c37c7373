"""Compile every Triton kernel for GPUs that are not here and report what the compilers made of it.

    python -m bench.kernels_report            writes bench/results/kernels.csv and docs/kernels.md

A stub driver stands in for the GPU, so kernels go through Triton's real launch specialisation
(alignment of pointers and sizes) down to cubin / hsaco. Exit status 1 if an offered configuration
breaks a rule on sm_80 or sm_90: register spills, no tensor-core instruction in a GEMM kernel (wgmma
on sm_90, but for shrink), shared memory over the limit, narrow stores although rows are aligned.
Nothing is timed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from bench.counts import PASSES
from bench.kernel_cases import Case, backward_bytes, cases
from bench.pages import DOCS, table, template, write_page
from bench.results_file import FOLDER

FIGURES, PAGE = FOLDER / "kernels.csv", DOCS / "kernels.md"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
STRICT = ("sm_80", "sm_90")
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
SHARED_PER_SM = {"sm_80": 167936, "sm_90": 233472, "sm_100": 233472, "gfx942": 65536}
# Dense 16-bit FLOPs per SM and clock, from the vendors' peak rates.
MMA_FLOPS_PER_CLOCK = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192}
COLUMNS = (
    "triton target kernel config dtype warps stages registers spill_store_bytes stack_bytes"
    " shared_bytes occupancy tensor_core loads_16B loads stores_16B stores issue_clocks mma_clocks"
    " broken"
).split()


class StubDriver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, name: str) -> None:
        self.index, self.target = list(TARGETS).index(name), TARGETS[name]

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index  # compiled kernels are cached per device: one each

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


# Reading what the compilers made

SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* 0x[0-9a-f]{16} \*/")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")


def _tool(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def _sass(path: str) -> list[tuple[int, str, str]]:
    """(address, operation, text) of every instruction."""
    found = map(SASS_LINE.match, _tool(knobs.nvidia.cuobjdump.path, "-sass", path).splitlines())
    texts = [(int(m[1], 16), PREDICATE.sub("", m[2].strip())) for m in found if m]
    return [(address, text.split()[0], text) for address, text in texts]


def _hot_loop(code: list[tuple[int, str, str]], tensor_core: str) -> list[str]:
    """Operations of the innermost loop with the most tensor-core instructions."""
    best: tuple[int, int, list[str]] = (0, 0, [])
    for address, op, text in code:
        target = re.search(r"0x[0-9a-f]+", text) if op.startswith("BRA") else None
        if target and int(target[0], 16) < address:
            body = [o for a, o, _ in code if int(target[0], 16) <= a <= address]
            best = max(best, (_count(body, tensor_core), -len(body), body))
    return best[2]


def _count(ops: list[str], pattern: str) -> int:
    return sum(bool(re.match(pattern, op)) for op in ops)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} in {text[:1000]}"
    return int(found[1])


def _ptxas(ptx: str, arch: int) -> str:
    """What ptxas reports of spills and stack."""
    newer = getattr(knobs.nvidia, "ptxas_blackwell", None) if arch >= 100 else None
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(ptx)
        file.flush()
        name = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        return _tool((newer or knobs.nvidia.ptxas).path, "-v", name, file.name, "-o", os.devnull)


def read_cuda(compiled: Any, target: str, case: Case) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _sass(file.name)
    registers, ops = _number(r"REG:(\d+)", usage), [op for _, op, _ in code]
    log = _ptxas(compiled.asm["ptx"], TARGETS[target].arch)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    blocks = min(
        65536 // 4 // (math.ceil(registers * 32 / 256) * 256) * 4 // warps,
        SHARED_PER_SM[target] // (math.ceil(shared / 128) * 128 + 1024),
        64 // warps,
        32,
    )
    figures = {
        "registers": registers,
        "spill_store_bytes": _number(r"(\d+) bytes spill stores", log),
        "stack_bytes": _number(r"(\d+) bytes stack frame", log),
        "shared_bytes": shared,
        "occupancy": round(blocks * warps / 64, 3),
        "tensor_core": _count(ops, case.tensor_core(target)),
        "loads_16B": _count(ops, r"^LDG\.\S*128|^LDGSTS\.\S*128|^UTMALDG"),
        "loads": _count(ops, r"^LDG|^UTMALDG"),
        "stores_16B": _count(ops, r"^STG\.\S*128|^UTMASTG"),
        "stores": _count(ops, r"^STG|^UTMASTG"),
    }
    loop = _hot_loop(code, case.tensor_core(target)) if case.flops_per_step else []
    if loop:  # four schedulers issue one instruction each per clock, for all warps of a block
        figures["issue_clocks"] = round(len(loop) * warps / 4)
        figures["mma_clocks"] = round(case.flops_on(target) / MMA_FLOPS_PER_CLOCK[target])
    return figures


def read_amd(compiled: Any, target: str, case: Case) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    ops = re.findall(r"^\s+((?:[vs]|buffer|global|flat|ds|scratch)_\w+)", text, re.MULTILINE)
    registers, shared = _number(r"\.vgpr_count:\s*(\d+)", text), compiled.metadata.shared
    blocks = min(8, 512 // max(8, math.ceil(registers / 8) * 8)) * 4 // compiled.metadata.num_warps
    if shared:
        blocks = min(blocks, SHARED_PER_SM[target] // shared)
    return {
        "registers": registers,
        "spill_store_bytes": 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text),
        "stack_bytes": _number(r"\.private_segment_fixed_size:\s*(\d+)", text),
        "shared_bytes": shared,
        "occupancy": round(blocks * compiled.metadata.num_warps / 32, 3),
        "tensor_core": _count(ops, case.tensor_core(target)),
        "loads_16B": _count(ops, r"^(buffer|global)_load_dwordx4"),
        "loads": _count(ops, r"^(buffer|global|flat)_load"),
        "stores_16B": _count(ops, r"^(buffer|global)_store_dwordx4"),
        "stores": _count(ops, r"^(buffer|global|flat)_store"),
    }


def broken_rules(case: Case, target: str, figures: dict[str, Any]) -> list[str]:
    """Why an offered configuration must not be offered on this target."""
    broken = []
    if figures["spill_store_bytes"]:
        broken.append(f"spills {figures['spill_store_bytes']} bytes")
    if case.flops_per_step and not figures["tensor_core"]:
        broken.append("no tensor-core instruction")
    if figures["shared_bytes"] > SHARED_LIMIT[target]:
        broken.append(f"{figures['shared_bytes']} bytes of shared memory")
    if case.aligned and not figures["stores_16B"]:
        broken.append("narrow stores although rows are aligned")
    return broken


def measure(target: str, case: Case) -> dict[str, Any]:
    """Compile a case for a target; its figures, or the error."""
    triton.runtime.driver.set_active(StubDriver(target))
    options = case.options_on(target)
    row: dict[str, Any] = {
        "triton": triton.__version__,
        "target": target,
        "kernel": case.kernel,
        "config": case.config_on(target),
        "dtype": case.dtype,
        "warps": options["num_warps"],
        "stages": options["num_stages"],
    }
    try:
        compiled = case.function.warmup(*case.args, grid=(1,), **options)
        read = read_amd if target.startswith("gfx") else read_cuda
        row |= read(compiled, target, case)
        row["broken"] = "; ".join(broken_rules(case, target, row))
    except Exception as error:  # a compiler's failure is a row of the report
        row["broken"] = f"does not compile: {type(error).__name__}: {str(error).strip()[-160:]}"
    return row


def _measure_nth(target: str, index: int) -> dict[str, Any]:
    return measure(target, next(itertools.islice(cases(), index, None)))


def passes() -> str:
    """The table of bytes, of the counts that `bench.roofline` projects from."""

    def text(counts: tuple[int, int, int]) -> str:
        units = zip(counts, ("M·X", "X", "Y"), strict=True)
        return " + ".join(f"{n if n > 1 else ''}{unit}" for n, unit in units if n)

    lines = []
    for name, (forward, backward) in PASSES.items():
        mx, x, y = (sum(pair) for pair in zip(forward, backward, strict=True))
        qkv, gate = (f"{mx * M + x + y * Y:g} X" for M, Y in ((3, 1.5), (2, 7)))
        lines.append((name, text(forward), text(backward), qkv, gate))
    header = ("", "forward", "backward", "q/k/v: M = 3, Y = 1.5 X", "gate/up: M = 2, Y = 7 X")
    return table(header, lines)


def backward() -> str:
    """The table of bytes of the backward pass's products, in MiB."""
    header = ("group", "product", "vendor's GEMMs", "one launch", "of these shares")
    lines = [
        (group, name, *(f"{count / 2**20:.1f}" for count in bytes_))
        for group, name, *bytes_ in backward_bytes()
    ]
    return table(header, lines, left=2)


def figures() -> list[dict[str, Any]]:
    """The rows of the last report."""
    with FIGURES.open(newline="") as file:
        return list(csv.DictReader(file))


HEADER = ("kernel", "configuration", "dtype", "registers", "spill", "stack", "shared")
HEADER += ("occupancy", "TC", "16-byte / plain loads", "16-byte stores", "issue / MMA", "note")


def cells(r: dict[str, Any]) -> list[Any]:
    named = [r["kernel"], r["config"], r["dtype"]]
    if not r.get("registers"):  # it does not compile
        return [*named, *[""] * 9, r["broken"].replace("|", "/").replace("\n", " ")]
    return [
        *(*named, r["registers"], r["spill_store_bytes"], r["stack_bytes"]),
        *(f"{int(r['shared_bytes']):,}", r["occupancy"], r["tensor_core"]),
        *(f"{r['loads_16B']} / {r['loads']}", f"{r['stores_16B']} of {r['stores']}"),
        f"{r['issue_clocks']} / {r['mma_clocks']}" if r.get("issue_clocks") else "",
        r["broken"],
    ]


def page(rows: list[dict[str, Any]]) -> str:
    """docs/kernels.md, of rows as `measure` or `figures` gives them."""
    sections = []
    for target in dict.fromkeys(r["target"] for r in rows):
        rules = "rules enforced" if target in STRICT else "figures only"
        lines = [cells(r) for r in rows if r["target"] == target]
        sections.append(f"## {target} ({rules})\n\n{table(HEADER, lines, left=3)}")
    version = rows[0]["triton"]
    return template(PAGE.name).format(
        version=version, targets="\n\n".join(sections), passes=passes(), backward=backward()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, help="only these; write nothing")
    parser.add_argument("--kernels", nargs="+", help="only these; write nothing")
    only = parser.parse_args()
    names = [case.kernel for case in cases()]
    chosen = [
        (target, i)
        for target in only.targets or TARGETS
        for i, kernel in enumerate(names)
        if kernel in (only.kernels or names)
    ]
    rows = []
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for row in pool.map(_measure_nth, *zip(*chosen, strict=True)):
            rows.append(row)
            print(*row.values(), file=sys.stderr, flush=True)
    if not (only.targets or only.kernels):
        with FIGURES.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        write_page(PAGE, page(rows))
    failures = [
        r
        for r in rows
        if r["broken"] and (r["target"] in STRICT or "does not compile" in r["broken"])
    ]
    for r in failures:
        print("FAIL", r["target"], r["kernel"], r["config"], r["dtype"], r["broken"])
    print(f"{len(rows)} compiled, {len(failures)} break a rule")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
