"""A group of LoRA linears: everything that a call needs but x."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from adarank_kernels.lora.backends import cpu
from adarank_kernels.lora.backends import torch as aten
from adarank_kernels.lora.dropout import keep_scale
from adarank_kernels.runtime import native
from adarank_kernels.runtime.registry import HAS_TRITON, INTERPRETED

if HAS_TRITON:
    from adarank_kernels.lora.backends import triton


class Group:
    """M linears that share an input. Storages are read in every call, shapes and dtypes compared.

    Attributes:
        parts: weight, bias, lora_A and lora_B of each module, or None.
        scalings: with the factor 1 / (1 - dropout) of the kept elements.
        adapted: the modules with a rank above 0; `lora_As` and `lora_Bs` are theirs.
        kept: what the backward pass needs of `parts`; without weights if x needs no gradient.
        all_needed: the bits of `adapted`.
        backend: how the products with few ranks are computed where nobody watches.
        whole: each pass may be one C++ call: dtypes that it knows, base weights frozen.
        safe_bases: the base products computed elsewhere that may be written into; None: all.
    """

    __slots__ = (
        "parts", "scalings", "dropout", "adapted", "lora_As", "lora_Bs", "scalings_of_adapted",
        "ranks", "dtypes_of_B", "inputs", "kept", "kept_without_weights", "all_needed", "backend",
        "whole", "device", "device_type", "safe_bases", "_tensors", "_shapes", "_dtypes", "_dtype",
    )  # fmt: skip

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Tensor | None],
        biases: Sequence[Tensor | None],
        lora_As: Sequence[Tensor | None],
        lora_Bs: Sequence[Tensor | None],
        scalings: Sequence[float],
        dropout: float,
        safe_bases: frozenset[int] | None = None,
    ) -> None:
        scale = keep_scale(dropout)
        self.scalings = tuple([float(s) * scale for s in scalings])
        self.dropout = float(dropout)
        zipped = list(zip(weights, biases, lora_As, lora_Bs, strict=True))
        self.parts = tuple([t for module in zipped for t in module])
        self.ranks = tuple([0 if A is None else A.shape[0] for A in lora_As])
        self.adapted = tuple([m for m, rank in enumerate(self.ranks) if rank])
        self.lora_As = tuple([A for A in lora_As if A is not None and A.shape[0]])
        self.lora_Bs = tuple([B for m in self.adapted if (B := lora_Bs[m]) is not None])
        self.scalings_of_adapted = tuple([self.scalings[m] for m in self.adapted])
        self.dtypes_of_B = tuple([None if B is None else B.dtype for B in lora_Bs])
        self.inputs = (*self.lora_As, *self.lora_Bs)
        self.kept = tuple([t for W, _, A, B in zipped for t in (W, None, A, B)])
        self.kept_without_weights = tuple([t for _, _, A, B in zipped for t in (None, None, A, B)])
        self.all_needed = sum([1 << m for m in self.adapted])
        self.device, self.device_type, self._dtype = x.device, x.device.type, x.dtype
        self._tensors = [t for t in self.parts if t is not None]
        self._shapes = [t.shape for t in self._tensors]
        self._dtypes = [t.dtype for t in self._tensors]
        self.safe_bases = safe_bases
        self.backend = choose_backend(x, self.inputs)
        frozen = not any(t is not None and t.requires_grad for t in weights)
        frozen = frozen and not any(b is not None and b.requires_grad for b in biases)
        self.whole = frozen and len(zipped) < 64 and self._whole_backend(x)

    def _whole_backend(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or INTERPRETED:
            return False
        if x.device.type == "cpu":
            return self.backend is cpu
        return HAS_TRITON and self.backend is triton and native.operators() is not None

    def fits(self, x: Tensor) -> bool:
        """Whether a call with x finds what this was made for: shapes, dtypes, devices."""
        return (
            x.dtype is self._dtype
            and x.device == self.device
            and [t.shape for t in self._tensors] == self._shapes
            and [t.dtype for t in self._tensors] == self._dtypes
        )

    def layout(
        self, backend: ModuleType, dtype: torch.dtype, modules: Sequence[int] | None = None
    ) -> tuple[int, tuple[int, ...]]:
        """(columns of S, first column of each of these modules)."""
        ranks = [self.ranks[m] for m in (self.adapted if modules is None else modules)]
        return side_by_side([backend.padded(rank, dtype) for rank in ranks])

    def may_overwrite(self, m: int, base: Tensor) -> bool:
        """Whether a base product from elsewhere may be written into: rows in order, not shared."""
        if self.safe_bases is not None and m not in self.safe_bases:
            return False
        leaf = base.is_leaf and base.requires_grad
        return base.is_contiguous() and not base._is_view() and not leaf


def side_by_side(widths: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """(their sum, where each starts)."""
    starts, end = [], 0
    for width in widths:
        starts.append(end)
        end += width
    return end, tuple(starts)


def choose_backend(x: Tensor, factors: Sequence[Tensor | None]) -> ModuleType:
    """The fastest one for tensors like these where nobody watches operators."""
    if INTERPRETED and x.dtype != torch.float64:
        return triton
    if x.device.type == "cpu":
        return cpu if cpu.usable(x, *factors) else aten
    if HAS_TRITON and x.device.type == "cuda" and not torch.compiler.is_compiling():
        return triton
    return aten
