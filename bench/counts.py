"""Bytes and FLOPs by counting: what the kernels report, the projection and the GPU benchmark share.

Standard library only. X is one pass over [tokens, in], Y one over [tokens, sum of outputs], R one
over [tokens, sum of ranks], all in 16-bit elements unless `itemsize` says otherwise.
"""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One layer of a real model, and what surrounds the layers."""

    width: int
    query: int
    kv: int
    inner: int
    head: int  # width of an attention head
    gated: bool
    layers: int
    vocabulary: int

    def groups(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Linears that share an input: name -> (in, outs)."""
        return {
            "q/k/v": (self.width, (self.query, self.kv, self.kv)),
            "o": (self.query, (self.width,)),
            "gate/up" if self.gated else "up": (self.width, (self.inner,) * (1 + self.gated)),
            "down": (self.inner, (self.width,)),
        }


SHAPES = {
    "SmolLM2-135M": Shape(576, 576, 192, 1536, 64, True, 30, 49152),
    "MiniLM": Shape(384, 384, 384, 1536, 32, False, 6, 30522),
    "MPNet-base": Shape(768, 768, 768, 3072, 64, False, 12, 30527),
    "Qwen3-0.6B": Shape(1024, 2048, 1024, 3072, 128, True, 28, 151936),
    "Llama-3.2-1B": Shape(2048, 2048, 512, 8192, 64, True, 16, 128256),
    "Llama-3-8B": Shape(4096, 4096, 1024, 14336, 128, True, 32, 128256),
}

# Passes over activations beyond the frozen base's own products, no dropout: coefficients of
# (M X, X, Y), forward and backward, for M modules that share an input.
PASSES = {
    "PEFT, adapters in bf16": ((1, 0, 6), (5, 0, 4)),
    "Unsloth": ((1, 0, 2), (4, 0, 3)),
    "LoRAFusion": ((1, 0, 0), (1, 0, 1)),
    "here": ((0, 1, 2), (0, 3, 2)),
    "floor with S stored": ((0, 1, 0), (0, 1, 1)),
}


def pass_elements(passes: tuple[int, int, int], width: int, outs: tuple[int, ...]) -> int:
    """Elements a token, of coefficients of (M X, X, Y)."""
    mx, x, y = passes
    return (mx * len(outs) + x) * width + y * sum(outs)


class Cost(NamedTuple):
    """What a kernel has to move and to compute at the least."""

    bytes: float
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The larger of moving (bytes a second) and computing (FLOPs a second)."""
        return max(self.bytes / bandwidth, self.flops / rate)


def product(M: int, N: int, K: int, itemsize: int = 2) -> Cost:
    """[M, K] x [K, N]: each operand read once, the result written once."""
    return Cost(itemsize * (M * K + K * N + M * N), 2.0 * M * N * K)


def expand(tokens: int, rank: int, outs: tuple[int, ...], itemsize: int = 2) -> Cost:
    """Y_m += S_m B_m^T, all of rank `rank`: Y is read and written, S and B are read."""
    moved = sum(tokens * (2 * out + rank) + out * rank for out in outs)
    return Cost(itemsize * moved, 2.0 * tokens * rank * sum(outs))


def grad_s(tokens: int, rank: int, outs: tuple[int, ...], shares: int = 1) -> Cost:
    """dS_m = s_m dY_m B_m in one launch, 16 bits: dY read once, float32 shares written and read."""
    moved = sum(tokens * (out + rank) + out * rank for out in outs)
    passed = tokens * rank * len(outs)
    return Cost(2 * moved + _of_shares(passed, shares), 2.0 * tokens * rank * sum(outs))


def grad_b(tokens: int, rank: int, outs: tuple[int, ...], shares: int = 1) -> Cost:
    """dB_m = s_m dY_m^T S_m in one launch: as `grad_s`."""
    same = grad_s(tokens, rank, outs)
    return Cost(same.bytes + _of_shares(rank * sum(outs), shares), same.flops)


def grad_a(tokens: int, width: int, ranks: int, shares: int = 1) -> Cost:
    """DA = dS^T drop(X), the mask drawn inside: X read once."""
    moved = product(ranks, width, tokens)
    return Cost(moved.bytes + _of_shares(ranks * width, shares), moved.flops)


def _of_shares(numbers: int, shares: int) -> int:
    """Bytes of float32 sums that are written and read again."""
    return 2 * 4 * numbers * shares if shares > 1 else 0


def drop(rows: int, columns: int, itemsize: int = 2) -> Cost:
    """A masked copy."""
    return Cost(2 * itemsize * rows * columns)


def pairs(variants: int, tokens: int, outputs: int, itemsize: int = 4) -> Cost:
    """Every row of [variants, tokens, outputs] read once; differences are not tensor-core work."""
    return Cost(itemsize * variants * tokens * outputs)
