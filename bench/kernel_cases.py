"""Every kernel x configuration x dtype that the launchers can ask for, ready to be compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.runtime.jit import MockTensor

from adarank_kernels.disagreement import triton as disagreement
from adarank_kernels.lora import triton_gradients
from adarank_kernels.lora import triton_gradients_launch as gradients
from adarank_kernels.lora import triton_kernels as lora
from adarank_kernels.lora import triton_launch as launch
from adarank_kernels.random import triton as philox
from bench import counts

TENSOR_CORE = {
    "sm_80": r"^HMMA",
    "sm_90": r"^[HQ]GMMA",  # of 64 rows at least
    "sm_100": r"^UTC\w*MMA|^[HQ]G?MMA",
    "gfx942": r"^v_mfma",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INT32, INT64, FP32 = (MockTensor(t) for t in (torch.int32, torch.int64, torch.float32))
PRECISION = {"PRECISION": "tf32"}


@dataclass
class Case:
    kernel: str
    config: str
    dtype: str
    function: Any
    args: list[Any]
    options: dict[str, Any]
    flops_per_step: int = 0  # of one block and one iteration of the hot loop; 0: no GEMM
    aligned: bool = True  # every stored row starts at 16 bytes: stores must be wide
    skinny: bool = False  # a tile of few rows and columns, bound by memory: HMMA will do
    there: dict[str, dict[str, int]] = field(default_factory=dict)  # target -> its own options

    def options_on(self, target: str) -> dict[str, Any]:
        """What the launchers choose there."""
        return self.options | self.there.get(target, {})

    def flops_on(self, target: str) -> int:
        """Of a step there."""
        rows = self.options_on(target).get("BLOCK_M", 1)
        return self.flops_per_step * rows // self.options.get("BLOCK_M", 1)

    def config_on(self, target: str) -> str:
        """Its name there."""
        return self.config.format(**self.options_on(target))

    def tensor_core(self, target: str) -> str:
        """A pattern of the instructions that it must have."""
        return r"^HMMA" if self.skinny and target == "sm_90" else TENSOR_CORE[target]


def cases() -> Iterator[Case]:
    """Every kernel x configuration x dtype that the launchers can ask for."""
    for name, dtype in DTYPES.items():
        yield from lora_cases(name, MockTensor(dtype))
        yield from gradient_cases(name, MockTensor(dtype))
    yield from disagreement_cases()
    for name, dtype in {"fp32": torch.float32, **DTYPES}.items():
        args = [MockTensor(dtype), INT64, 4096 * 4096]
        options = philox.FILL | {"WORDS": False}
        yield Case("philox fill", "normals", name, philox.fill_kernel, args, options)


def lora_cases(name: str, t: MockTensor) -> Iterator[Case]:
    for R, even, dropout in itertools.product(launch.SHRINK_BLOCKS_R, (True, False), (False, True)):
        K = 4096 if even else 4112
        config = f"R={R}{'' if even else ' ragged'}{' dropout' if dropout else ''}"
        args = [t, t, t, INT64, 8192, K, R, K, 6554]
        options = launch.SHRINK | PRECISION | {"BLOCK_R": R, "EVEN_K": even, "DROPOUT": dropout}
        flops = 2 * launch.SHRINK["BLOCK_M"] * launch.SHRINK["BLOCK_K"] * R
        aligned = R == 64  # of fewer, a thread holds less than 16 bytes
        kernel = lora.shrink_kernel
        yield Case("shrink", config, name, kernel, args, options, flops, aligned, skinny=True)
    M, N, R = (launch.EXPAND[f"BLOCK_{axis}"] for axis in "MNR")
    for b, aligned in itertools.product((t, FP32), (True, False)):
        config = "{BLOCK_M}x{BLOCK_N}"
        config += f"{' B fp32' if b is FP32 else ''}{'' if aligned else ' ragged'}"
        args = [t, *[t] * 4, *[b] * 4, FP32, INT32, 8192, 48]
        options = launch.EXPAND | PRECISION | {"ALIGNED": aligned}
        there = {} if aligned else {"sm_100": launch.SMALLER}
        kernel, flops = lora.expand_kernel, 2 * M * N * R
        yield Case("expand", config, name, kernel, args, options, flops, aligned, there=there)
    for add in (True, False):
        args = [t, t, INT64, 8192, 4096, 4096, 6554]
        options = launch.DROP | {"ADD": add}
        yield Case("drop", "add" if add else "copy", name, lora.drop_kernel, args, options)


def gradient_cases(name: str, t: MockTensor) -> Iterator[Case]:
    """What waits for a verdict; of several shares unless said."""
    M, K = gradients.GRAD_S["BLOCK_M"], gradients.GRAD_S["BLOCK_K"]
    for R, how in itertools.product(gradients.BLOCKS_R, ("", " B fp32", " one share")):
        b, out = FP32 if how == " B fp32" else t, t if how == " one share" else FP32
        if b is FP32 and R > gradients.CAST_R:
            continue
        args = [out, *[t] * 4, *[b] * 4, FP32, INT32, 8192, 48, 1 if out is t else 7]
        options = gradients.GRAD_S | PRECISION | {"BLOCK_R": R}
        kernel, config = triton_gradients.grad_s_kernel, f"{M}x{K} R={R}{how}"
        stores = out is FP32 or R > 16  # of fewer, a thread holds less than 16 bytes
        flops, there = 2 * M * K * R, {"gfx942": gradients.ON_ROCM}
        yield Case("grad_s", config, name, kernel, args, options, flops, stores, there=there)
    for dropout, how in itertools.product((False, True), ("", " one share")):
        made = gradients.DROPPED if dropout else gradients.OUTER
        M, N = made["BLOCK_M"], made["BLOCK_N"]
        for R in (*gradients.BLOCKS_R, *[gradients.WIDE] * dropout):
            out = t if how == " one share" else FP32
            shares = 1 if out is t else 7
            args = [out, *[t] * 4, t, INT64, FP32, INT32, 8192, 48, 4096 * 48, shares, 6554]
            options = made | PRECISION | {"BLOCK_R": R, "DROPOUT": dropout}
            title = "grad_a" if dropout else "grad_b"
            kernel, config = triton_gradients.outer_kernel, f"{M}x{N} R={R}{how}"
            # ranks are not aligned; dA is stored along X's columns
            stores = dropout and (out is FP32 or R > 16)
            yield Case(title, config, name, kernel, args, options, 2 * M * N * R, stores)
    args, kernel = [FP32, t, 4096 * 48, 7], triton_gradients.total_kernel
    yield Case("total", "shares", name, kernel, args, gradients.TOTAL)


def backward_bytes() -> Iterator[tuple[str, str, int, int, int]]:
    """(group, product, bytes of the vendor's GEMMs, of our kernel, of these the shares').

    Adapters of rank 16 in 16 bits, 4,096 tokens. The vendor's GEMMs, one for each module, read dY
    once each, too; with dropout they meet a drop(X) that was written for them.
    """
    N, rank = 4096, 16
    for kind, group in (
        ("Qwen3-0.6B", "q/k/v"),
        ("Llama-3-8B", "q/k/v"),
        ("Llama-3-8B", "gate/up"),
    ):
        width, outs = counts.SHAPES[kind].groups()[group]
        ranks = [rank] * len(outs)
        for name, count, shares in (
            ("grad_s", counts.grad_s, gradients.grad_s_shares(N, outs, ranks)),
            ("grad_b", counts.grad_b, gradients.outer_shares(N, outs, ranks)),
        ):
            plain, ours = count(N, rank, outs).bytes, count(N, rank, outs, shares).bytes
            yield f"{kind} {group}", name, int(plain), int(ours), int(ours - plain)
        packed = sum(ranks)
        shares = gradients.outer_shares(N, [width], [packed], drops=True)
        plain = counts.drop(N, width).bytes + counts.grad_a(N, width, packed).bytes
        ours, passed = (counts.grad_a(N, width, packed, s).bytes for s in (shares, 1))
        yield f"{kind} {group}", "grad_a, dropout", int(plain), int(ours), int(ours - passed)


def disagreement_cases() -> Iterator[Case]:
    """Outputs are float32: products of a head always are. A few sums are stored per 4,096."""
    sizes = [512, 49152, 512 * 49152, 49152, disagreement.SPLIT]  # tokens, V, two strides
    for metric, K, ALL in itertools.product(disagreement.METRICS, (8, 16), (True, False)):
        config = f"{metric} K={K}{'' if ALL else ' reference'}"
        args = [*[FP32] * 5, K, *sizes]
        options = disagreement.pairs_options(metric) | {"METRIC": metric, "K": K, "ALL": ALL}
        kernel = disagreement.pairs_kernel
        yield Case("pairs", config, "fp32", kernel, args, options, aligned=False)
    config, args = "{M}x{BLOCK_V}".format(**disagreement.PAIRS), [*[FP32] * 5, 8, *sizes]
    kernel = disagreement.rows_kernel
    yield Case("rows", config, "fp32", kernel, args, disagreement.PAIRS, aligned=False)
