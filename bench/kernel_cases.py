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
    int32, int64, fp32 = (MockTensor(t) for t in (torch.int32, torch.int64, torch.float32))
    precision = {"PRECISION": "tf32"}
    for name, dtype in DTYPES.items():
        t = MockTensor(dtype)
        for R, even, dropout in itertools.product(
            launch.SHRINK_BLOCKS_R, (True, False), (False, True)
        ):
            K = 4096 if even else 4112
            options = launch.SHRINK | precision
            options |= {"BLOCK_R": R, "EVEN_K": even, "DROPOUT": dropout}
            yield Case(
                "shrink",
                f"R={R}{'' if even else ' ragged'}{' dropout' if dropout else ''}",
                name,
                lora.shrink_kernel,
                [t, t, t, int64, 8192, K, R, K, 6554],
                options,
                2 * launch.SHRINK["BLOCK_M"] * launch.SHRINK["BLOCK_K"] * R,
                aligned=R == 64,  # of fewer, a thread holds less than 16 bytes
                skinny=True,
            )
        for b, aligned in itertools.product((t, fp32), (True, False)):
            suffix = (" B fp32" if b is fp32 else "") + ("" if aligned else " ragged")
            M, N, R = (launch.EXPAND[f"BLOCK_{axis}"] for axis in "MNR")
            yield Case(
                "expand",
                f"{M}x{N}{suffix}",
                name,
                lora.expand_kernel,
                [t, *[t] * 4, *[b] * 4, fp32, int32, 8192, 48],
                launch.EXPAND | precision | {"ALIGNED": aligned},
                2 * M * N * R,
                aligned,
            )
        for add in (True, False):
            yield Case(
                "drop",
                "add" if add else "copy",
                name,
                lora.drop_kernel,
                [t, t, int64, 8192, 4096, 4096, 6554],
                launch.DROP | {"ADD": add},
            )
    yield from disagreement_cases()
    for name, dtype in {"fp32": torch.float32, **DTYPES}.items():
        yield Case(
            "philox fill",
            "normals",
            name,
            philox.fill_kernel,
            [MockTensor(dtype), int64, 4096 * 4096],
            philox.FILL | {"WORDS": False},
        )


def disagreement_cases() -> Iterator[Case]:
    """Outputs are float32: products of a head always are."""
    fp32 = MockTensor(torch.float32)
    sizes = [512, 49152, 512 * 49152, 49152, disagreement.SPLIT]  # tokens, V, two strides
    for metric, K, ALL in itertools.product(disagreement.METRICS, (8, 16), (True, False)):
        yield Case(
            "pairs",
            f"{metric} K={K}{'' if ALL else ' reference'}",
            "fp32",
            disagreement.pairs_kernel,
            [*[fp32] * 5, K, *sizes],
            disagreement.pairs_options(metric) | {"METRIC": metric, "K": K, "ALL": ALL},
            aligned=False,  # a few sums per 4,096 outputs
        )
    yield Case(
        "rows",
        f"{disagreement.PAIRS['M']}x{disagreement.PAIRS['BLOCK_V']}",
        "fp32",
        disagreement.rows_kernel,
        [*[fp32] * 5, 8, *sizes],
        disagreement.PAIRS,
        aligned=False,  # a number a row
    )
