"""The autograd node of grouped_lora.py, where its maths is written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adarank_kernels.lora import skinny as _skinny
from adarank_kernels.lora.backward import backward
from adarank_kernels.lora.parts import Spec, alone, drop, pack, rows, scaled, side_by_side, straight
from adarank_kernels.runtime.registry import HAS_TRITON

if HAS_TRITON:
    from adarank_kernels.lora import triton_launch as launch

# As in F.linear: a reader could not change an output in place (relu_, +=) if it were a view.
_unsafe_view = torch.ops.aten._unsafe_view.default


_CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}


def _shrink(
    X: Tensor, lora_As: Sequence[Tensor | None], seed: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor | None]:
    """S = drop(X) A^T; and A as it was packed for a kernel, which the backward pass can use again.

    Not on the CPU, where packing takes no launch and memory is short.
    """
    if spec.native:
        S = X.new_empty(X.shape[0], spec.columns[-1])
        factors = side_by_side(lora_As, spec.adapted, spec.columns)
        _skinny.narrow(drop(X, seed, spec), S, factors)
        return S, None
    A = pack(lora_As, spec.adapted, spec.columns, spec, X.dtype)
    kept = A if spec.kernels else None
    if (
        seed is not None and "lora_shrink" in spec.kernels
    ):  # without dropout the vendor's is as fast
        return launch.shrink(X, A, seed, spec.dropout), kept
    return torch.mm(drop(X, seed, spec), A.t()), kept


def _expand(base: Tensor, S: Tensor, B: Tensor, alpha: float) -> Tensor:
    """base += alpha S B^T, in place; cast where a foreign base has a dtype of its own."""
    if base.dtype == S.dtype:
        return base.addmm_(S, B.t(), alpha=alpha)
    return base.add_(torch.mm(S, B.t()), alpha=alpha)


def _may_overwrite(base: Tensor) -> bool:
    """Whether `base` can be added into: rows in order, no view, no leaf that wants its gradient."""
    if torch.compiler.is_compiling():
        return False
    leaf = base.is_leaf and base.requires_grad
    return base.is_contiguous() and not base._is_view() and not leaf


class GroupedLoraLinear(torch.autograd.Function):
    """Tensors, M of each: weights, biases, lora_As, lora_Bs, base_outputs (None: absent)."""

    @staticmethod
    def forward(
        ctx: Any, spec: Spec, x: Tensor, seed: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        M = len(spec.ranks)
        weights, biases, lora_As, lora_Bs, bases = (tensors[i * M : i * M + M] for i in range(5))
        X = straight(rows(x), spec)
        first = spec.first
        S = packed = None
        if spec.adapted:
            S, packed = _shrink(X, lora_As, seed, spec)
            for m in spec.ones:
                S.select(1, first[m] + spec.ranks[m]).fill_(1.0)
        compiling = torch.compiler.is_compiling()
        in_order = (spec.folded or bool(spec.kernels)) and x.is_contiguous()
        outputs: list[Tensor] = []
        dirty: list[Tensor] = []
        later: list[tuple[Tensor, int, Tensor, float]] = []  # for one launch of expand
        for m, base in enumerate(bases):
            B = lora_Bs[m] if spec.ranks[m] else None
            bias, weight = biases[m], weights[m]
            if m in spec.biased:
                bias = None
            Y = None  # the output, if it has its shape already
            if base is not None:
                if B is not None and _may_overwrite(base):
                    dirty.append(base)
                    Y, Y2 = base, rows(base)
                else:
                    Y2 = rows(base).clone(**_CONTIGUOUS)
            elif in_order and bias is None:  # no view on the way out; with a bias there is one
                Y = Y2 = F.linear(x, weight)  # type: ignore[arg-type]
                if x.dim() != 2 and "lora_expand" not in spec.kernels:
                    Y2 = Y.view(-1, Y.shape[-1])
            else:
                Y2 = F.linear(X, weight, bias)  # type: ignore[arg-type]
            if S is not None and B is not None:
                if spec.native:
                    S_m = S.narrow(1, first[m], B.shape[1] + B.shape[1] % 2)
                    late = biases[m] if m in spec.biased else None
                    _skinny.wide(Y2, S_m, alone(B), spec.scalings[m], late)
                elif "lora_expand" in spec.kernels and Y2.dtype == S.dtype:
                    later.append((Y2, first[m], B, spec.scalings[m]))
                else:
                    B = scaled(B, m, spec, S.dtype)
                    if m in spec.ones:
                        B = torch.cat([B, biases[m].unsqueeze(1)], 1)  # type: ignore[union-attr]
                    _expand(Y2, S.narrow(1, first[m], B.shape[1]), B, spec.alpha(m))
            if Y is None and x.dim() == 2 and not compiling:
                Y = Y2
            elif Y is None:  # torch.compile of torch 2.11 loses the gradient of what addmm_ changed
                Y = _unsafe_view(Y2, [*x.shape[:-1], Y2.shape[-1]])
            outputs.append(Y)
        if later:
            assert S is not None
            products, offsets, Bs, scalings = zip(*later, strict=True)
            launch.expand(products, S, offsets, Bs, scalings)
        if dirty:
            ctx.mark_dirty(*dirty)

        need_x, _, *needs = ctx.needs_input_grad[1:]
        need_W, _, need_A, need_B, _ = (needs[i * M : i * M + M] for i in range(5))
        absent = (None,) * M
        ctx.save_for_backward(
            x if any(need_W) or any(need_A) else None,
            S if any(need_B) else None,
            seed,
            packed if need_x else None,
            *(weights if need_x else absent),
            *(lora_As if need_x else absent),
            *(lora_Bs if need_x or any(need_A) else absent),
        )
        ctx.spec, ctx.x_shape, ctx.dtype = spec, x.shape, x.dtype
        ctx.device_type = x.device.type
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(ctx.device_type):
            return backward(ctx, dYs)
        with torch.autocast(ctx.device_type, enabled=False):  # the forward's dtypes hold
            return backward(ctx, dYs)
