"""Every kernel x configuration x dtype that the launchers can ask for, ready to be compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.jit import MockTensor

from adarank_kernels.disagreement import triton as disagreement
from adarank_kernels.lora import triton_kernels as lora
from adarank_kernels.lora import triton_launch as launch
from adarank_kernels.random import triton as philox

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

    def tensor_core(self, target: str) -> str:
        """A pattern of the instructions that it must have."""
        return r"^HMMA" if self.skinny and target == "sm_90" else TENSOR_CORE[target]


def cases() -> Iterator[Case]:
    """Every kernel x configuration x dtype that the launchers can ask for."""
    for name, dtype in DTYPES.items():
        yield from lora_cases(name, MockTensor(dtype))
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
        config = f"{M}x{N}{' B fp32' if b is FP32 else ''}{'' if aligned else ' ragged'}"
        args = [t, *[t] * 4, *[b] * 4, FP32, INT32, 8192, 48]
        options = launch.EXPAND | PRECISION | {"ALIGNED": aligned}
        kernel = lora.expand_kernel
        yield Case("expand", config, name, kernel, args, options, 2 * M * N * R, aligned)
    for add in (True, False):
        args = [t, t, INT64, 8192, 4096, 4096, 6554]
        options = launch.DROP | {"ADD": add}
        yield Case("drop", "add" if add else "copy", name, lora.drop_kernel, args, options)


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
