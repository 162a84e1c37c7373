"""A group of LoRA linears: everything that a call needs but x."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from adarank_kernels.lora.backends import cpu
from adarank_kernels.lora.backends import torch as aten
from adarank_kernels.lora.dropout import draw_mask, draw_seed, keep_probability, keep_scale
from adarank_kernels.runtime import native
from adarank_kernels.runtime.registry import HAS_TRITON, INTERPRETED

if HAS_TRITON:
    from adarank_kernels.lora.backends import triton

HOST_BOUND = 1 << 23  # numbers of a group's outputs; a choice by host time, which waits for a card
PADDING = 16  # of the ranks where Triton adds the low-rank products


_making = threading.Lock()
_gone: deque[int] = deque()  # numbers of groups in C++ that nobody has any more


class _Number:
    """Of a group in C++, as long as the group lives.

    Freeing waits until another group is made: modes that are active now would see the call.
    """

    __slots__ = ("value",)

    def __init__(self, group: Group, x: Tensor) -> None:
        with contextlib.suppress(IndexError):
            while True:
                torch.ops.adarank.free_group(_gone.popleft())
        make = torch.ops.adarank.make_group
        self.value: int = make(x, group.parts, group.scalings, group.dropout, PADDING)

    def __del__(self, gone: deque[int] = _gone) -> None:
        if hasattr(self, "value"):
            gone.append(self.value)


class Group:
    """M linears that share an input. Storages are read in every call, shapes and dtypes compared.

    Attributes:
        parts: weight, bias, lora_A and lora_B of each module, or None.
        scalings: with the factor 1 / (1 - dropout) of the kept elements.
        alphas: whether multiplying with the scaling rounds nothing that counts.
        keep: the probability of an element to be kept.
        adapted: the modules with a rank above 0; `lora_As` and `lora_Bs` are theirs.
        kept: what the backward pass needs of `parts`; without weights if x needs no gradient.
        all_needed: the bits of `adapted`.
        out: columns of all outputs with an adapter.
        backend: how the products with few ranks are computed where nobody watches.
        whole: each pass may be one C++ call: dtypes that it knows, base weights frozen.
        trains_bias: some base bias wants a gradient.
        flat: without C++, few inputs may go through `flat.py`.
        number, compute: of the group in C++, and the operator, once `whole` has made them.
        owned: bits of the base products computed elsewhere that may be written into.
    """

    __slots__ = (
        "parts", "scalings", "alphas", "dropout", "keep", "adapted", "lora_As", "lora_Bs", "ranks",
        "scalings_of_adapted", "dtypes_of_B", "inputs", "kept", "kept_without_weights",
        "all_needed", "backend", "whole", "flat", "trains_bias", "compute", "number", "out",
        "device", "device_type", "dtype", "owned", "_number", "_tensors", "_shapes", "_dtypes",
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
        exact = x.dtype.itemsize > 2
        self.alphas = tuple([exact or math.frexp(s)[0] in (0.5, -0.5, 0.0) for s in self.scalings])
        self.dropout, self.keep = float(dropout), keep_probability(dropout)
        zipped = list(zip(weights, biases, lora_As, lora_Bs, strict=True))
        self.parts = tuple([t for module in zipped for t in module])
        self.ranks = tuple([0 if A is None else A.shape[0] for A in lora_As])
        self.adapted = tuple([m for m, rank in enumerate(self.ranks) if rank])
        self.lora_As = tuple([A for A in lora_As if A is not None and A.shape[0]])
        ranked = zip(lora_Bs, self.ranks, strict=True)
        self.lora_Bs = tuple([B for B, rank in ranked if B is not None and rank])
        self.scalings_of_adapted = tuple([self.scalings[m] for m in self.adapted])
        self.dtypes_of_B = tuple([None if B is None else B.dtype for B in lora_Bs])
        self.inputs = (*self.lora_As, *self.lora_Bs)
        self.kept = tuple([t for W, _, A, B in zipped for t in (W, None, A, B)])
        self.kept_without_weights = tuple([t for _, _, A, B in zipped for t in (None, None, A, B)])
        self.all_needed = sum([1 << m for m in self.adapted])
        self.device, self.device_type, self.dtype = x.device, x.device.type, x.dtype
        self._tensors = [t for t in self.parts if t is not None]
        self._shapes = [t.shape for t in self._tensors]
        self._dtypes = [t.dtype for t in self._tensors]
        self.owned = -1 if safe_bases is None else sum([1 << m for m in safe_bases])
        self.out = sum([B.shape[0] for B in lora_Bs if B is not None])
        self.backend = choose_backend(x, self.inputs)
        frozen = not any(t is not None and t.requires_grad for t in weights)
        self.trains_bias = any([b is not None and b.requires_grad for b in biases])
        self.number = 0
        self._number: _Number | None = None
        self.compute: Callable[..., Sequence[Tensor]] | None = None
        self.whole = frozen and len(zipped) < 64 and self._whole_backend(x)
        self.flat = not (self.whole or self.backend is cpu or INTERPRETED)

    def _whole_backend(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or INTERPRETED:
            return False
        if x.device.type == "cpu":
            return self.backend is cpu
        return HAS_TRITON and self.backend is triton and native.operators() is not None

    def is_few(self, x: Tensor) -> bool:
        """Whether Python takes longer than the device, on one that is not the CPU with C++.

        A Triton launch from Python is slow then, and a mask that Triton would draw again. Not where
        a CUDA graph is captured: it runs without Python.
        """
        if self.backend is cpu or x.numel() * self.out > HOST_BOUND * x.shape[-1]:
            return False
        return not (x.is_cuda and torch.cuda.is_current_stream_capturing())

    def draw(self, x: Tensor) -> Tensor | None:
        """What stands for the dropout mask of a call: a seed, or the mask; None without dropout.

        The same for one x whatever computes the group, so that a checkpoint's forward and its
        repetition, of which a dispatch mode may see only one, get the same mask.
        """
        if self.dropout == 0.0 or not self.adapted:
            return None
        if torch.compiler.is_compiling() or not self.is_few(x):
            return draw_seed(x.device)
        return draw_mask(x.reshape(-1, x.shape[-1]), self.keep)

    def takes(self, seed: Tensor) -> bool:
        """Whether a mask, drawn for another group, may be this one's; a seed always is."""
        return seed.dtype is torch.int64 or (seed.dtype is self.dtype and self.backend is not cpu)

    def make_whole(self, x: Tensor) -> bool:
        """Make the group in C++, where nobody watches operators; False if it does not fit x."""
        with _making:
            if self.compute is None and self.fits(x):
                self._number = _Number(self, x)
                self.number = self._number.value
                self.compute = torch.ops.adarank.group_linear.default._op  # no Python frame
        return self.compute is not None

    def fits(self, x: Tensor) -> bool:
        """Whether a call with x finds what this was made for: shapes, dtypes, devices."""
        return (
            x.dtype is self.dtype
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
        if not self.owned >> m & 1:
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
