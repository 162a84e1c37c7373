"""What the forward and backward of a group of LoRA linears share: see grouped_lora.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adarank_kernels.lora import skinny as _skinny
from adarank_kernels.lora.dropout import keep_mask, threshold
from adarank_kernels.lora.skinny import Factors
from adarank_kernels.runtime.registry import HAS_TRITON, INTERPRETED, ready_among

if HAS_TRITON:
    from adarank_kernels.lora import triton_launch as launch


class Spec(NamedTuple):
    """What is not a tensor: constant from step to step."""

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]  # 1 / (1 - dropout) folded in
    dropout: float
    adapted: tuple[int, ...]  # the modules with a rank above 0
    A_dtypes: tuple[torch.dtype | None, ...]
    B_dtypes: tuple[torch.dtype | None, ...]
    folded: bool  # on the CPU: scalings on B; the biases of `biased` join the low-rank product
    biased: tuple[int, ...]
    kernels: frozenset[str]  # the Triton kernels that passed their check on this device
    native: bool = False  # on the CPU: products with few ranks by _skinny
    columns: tuple[int, ...] = ()  # `starts` of the adapted modules in S; see `placed`
    first: tuple[int, ...] = ()  # of each module its first column in S; 0 if it has none

    def placed(self, **changes: Any) -> Spec:
        """With these changes, and the columns that go with them."""
        spec = self._replace(**changes)
        columns = tuple(spec.starts(spec.adapted, spec.ones))
        first = dict(zip(spec.adapted, columns, strict=False))
        return spec._replace(
            columns=columns, first=tuple(first.get(m, 0) for m in range(len(spec.ranks)))
        )

    @property
    def ones(self) -> tuple[int, ...]:
        """Modules whose segment of S ends with a column of ones, which meets their bias."""
        return () if self.native else self.biased

    def starts(self, modules: Sequence[int], ones: Sequence[int] = ()) -> list[int]:
        """First columns of these modules' segments, packed side by side; then the total width."""
        starts = [0]
        for m in modules:
            rank = self.ranks[m] + int(m in ones)
            if self.kernels:
                rank = launch.padded(rank)
            elif self.native:
                rank += rank % 2
            starts.append(starts[-1] + rank)
        return starts

    def alpha(self, m: int) -> float:
        """The factor of a product with B_m or dY_m."""
        return 1.0 if self.folded else self.scalings[m]


_ANY_WIDTH = ("lora_expand", "lora_drop")


_KERNELS = (*_ANY_WIDTH, "lora_shrink")


def ready_kernels(x: Tensor) -> frozenset[str]:
    """The Triton kernels that may run on this input."""
    if not INTERPRETED and (x.device.type != "cuda" or torch.compiler.is_compiling()):
        return _NO_KERNELS
    names = _KERNELS if launch.rows_aligned(x) else _ANY_WIDTH
    return ready_among(names, x.device, x.dtype)


_NO_KERNELS: frozenset[str] = frozenset()


def rows(tensor: Tensor) -> Tensor:
    """[..., features] -> [N, features], a view wherever one exists."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def pack(
    lora_As: Sequence[Tensor | None],
    modules: Sequence[int],
    starts: Sequence[int],
    spec: Spec,
    dtype: torch.dtype,
) -> Tensor:
    """Stack [r, in] to [R, in] in the compute dtype; a lone A of that dtype is not copied.

    Rows beyond a module's rank repeat others: their columns of S are not read, of dS zero.
    """
    pieces: list[Tensor] = []
    for i, m in enumerate(modules):
        A: Tensor = lora_As[m]  # type: ignore[assignment]
        more = starts[i + 1] - starts[i] - A.shape[0]
        pieces.append(A)
        if more:
            pieces.append(A[:more] if more <= len(A) else A[:1].expand(more, -1))
    packed = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return cast(packed, dtype)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # the call costs a microsecond


def scaled(B: Tensor, m: int, spec: Spec, dtype: torch.dtype) -> Tensor:
    """B_m in the compute dtype, times s_m where folded."""
    if spec.folded and spec.scalings[m] != 1.0:
        B = B * spec.scalings[m]
    return cast(B, dtype)


def drop(X: Tensor, seed: Tensor | None, spec: Spec) -> Tensor:
    """X with its dropped elements at zero; their scale is in spec.scalings."""
    if seed is None:
        return X
    if "lora_drop" in spec.kernels:
        return launch.drop(X, seed, spec.dropout)
    if spec.native:
        return _skinny.drop(X, seed, threshold(spec.dropout), torch.empty_like(X))
    return X * keep_mask(seed, X.shape[0], X.shape[1], spec.dropout)


def side_by_side(
    lora_As: Sequence[Tensor | None] | Mapping[int, Tensor],
    modules: Sequence[int],
    starts: Sequence[int],
) -> Factors:
    """A of these modules, or its gradients, by the columns of S."""
    return Factors([lora_As[m] for m in modules], [0] * len(modules), list(starts[:-1]))  # type: ignore[misc]


def alone(B: Tensor) -> Factors:
    """B of one module, or its gradient, by the columns of its segment of S."""
    return Factors((B,), (1,), (0,))


def straight(rows: Tensor, spec: Spec) -> Tensor:
    """Rows as _skinny reads them, their elements side by side; as they are for everyone else."""
    if not spec.native or (rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]):
        return rows
    return rows.contiguous()
