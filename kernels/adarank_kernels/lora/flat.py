"""A group's passes in Python with as few calls as they take: where no C++ operators can be built.

For frozen base weights, trained adapters and inputs so few that Python takes longer than the device
(`Group.is_few`). The maths is in op.py; ranks lie side by side, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adarank_kernels.lora.group import Group

if TYPE_CHECKING:
    from adarank_kernels.lora.node import _Context


class Flat(torch.autograd.Function):
    """Tensors: A and then B of the modules with a rank, then foreign base products or None."""

    @staticmethod
    def forward(
        ctx: _Context, group: Group, x: Tensor, mask: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The outputs of all modules; `mask` is x's, or None."""
        adapted, ranks, scalings, parts = group.adapted, group.ranks, group.scalings, group.parts
        count, dtype = len(adapted), group.dtype
        As: Any = tensors[:count]
        bases = tensors[2 * count :]
        X = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        A = torch.cat(As) if count > 1 else As[0]
        if A.dtype is not dtype:
            A = A.to(dtype)
        S = torch.mm(X if mask is None else X * mask, A.t())
        outputs, low_Bs, dirty = [], [], []
        first = at = 0
        for m, rank in enumerate(ranks):
            base = bases[m] if bases else None
            if base is None:
                Y = F.linear(x, parts[4 * m], parts[4 * m + 1])  # type: ignore[arg-type]
            elif rank and group.may_overwrite(m, base):
                Y = base
                dirty.append(base)
            else:
                Y = base.clone(memory_format=torch.contiguous_format)
            if rank:
                B: Any = tensors[count + at]
                if B.dtype is not dtype:
                    B = B.to(dtype)
                low_Bs.append(B)
                S_m = S if count == 1 else S.narrow(1, first, rank)
                rows = Y if Y.dim() == 2 else Y.view(-1, Y.shape[-1])
                rows.addmm_(S_m, B.t(), alpha=scalings[m])
                first += rank
                at += 1
            outputs.append(Y)
        if dirty:
            ctx.mark_dirty(*dirty)
        need_x = ctx.needs_input_grad[1]
        weights = parts[::4] if need_x else ()
        inputs = tensors[: 2 * count]  # nobody may have written into them since
        ctx.save_for_backward(x, S, A if need_x else None, mask, *low_Bs, *weights, *inputs)
        ctx.group = group
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: _Context, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, of every A and B, and of the foreign base products."""
        if torch.is_grad_enabled():  # create_graph: the result refuses to be differentiated
            return _once(ctx, *dYs)
        return _backward(ctx, *dYs)


def _backward(ctx: _Context, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
    group = ctx.group
    ranks, scalings, adapted = group.ranks, group.scalings, group.adapted
    count, M = len(adapted), len(ranks)
    saved = ctx.saved_tensors
    x, S, A, mask = saved[:4]
    low_Bs = saved[4 : 4 + count]
    weights = saved[4 + count :] if A is not None else None
    X = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    dX: Tensor | None = None
    dBs: list[Tensor | None] = []
    parts: list[Tensor] = []
    first = at = 0
    for m, rank in enumerate(ranks):
        dY = dYs[m]
        if dY is not None and dY.dim() != 2:
            dY = dY.reshape(-1, dY.shape[-1])
        if weights is not None and dY is not None and weights[m] is not None:
            dX = torch.mm(dY, weights[m]) if dX is None else dX.addmm_(dY, weights[m])
        if not rank:
            continue
        if dY is None:
            dBs.append(None)
            parts.append(X.new_zeros(X.shape[0], rank))
        else:
            S_m = S if count == 1 else S.narrow(1, first, rank)
            scaling, B = scalings[m], low_Bs[at]
            if scaling == 1.0:
                dB = torch.mm(dY.t(), S_m)
                parts.append(torch.mm(dY, B))
            else:
                dB = dY.new_empty(dY.shape[1], rank).addmm_(dY.t(), S_m, beta=0.0, alpha=scaling)
                part = dY.new_empty(dY.shape[0], rank)
                parts.append(part.addmm_(dY, B, beta=0.0, alpha=scaling))
            wanted = group.dtypes_of_B[m]
            dBs.append(dB if dB.dtype is wanted else dB.to(wanted))
        first += rank
        at += 1
    dS = torch.cat(parts, 1) if count > 1 else parts[0]
    if A is not None:
        if mask is not None:
            low = torch.mm(dS, A)
            dX = low.mul_(mask) if dX is None else dX.addcmul_(low, mask)
        else:
            dX = torch.mm(dS, A) if dX is None else dX.addmm_(dS, A)
        if x.dim() != 2:
            dX = dX.view(x.shape)
    dA = torch.mm(dS.t(), X if mask is None else X * mask)
    dAs = _split(dA, group)
    if None in dBs:
        dAs = [None if dB is None else each for each, dB in zip(dAs, dBs, strict=True)]
    if len(ctx.needs_input_grad) == 3 + 2 * count:
        return None, dX, None, *dAs, *dBs
    bases = [dYs[m] if ctx.needs_input_grad[3 + 2 * count + m] else None for m in range(M)]
    return None, dX, None, *dAs, *dBs, *bases


def _split(dA: Tensor, group: Group) -> Sequence[Tensor | None]:
    """The modules' rows, each in the dtype of its A."""
    As = group.lora_As
    if len(As) == 1:
        return [dA if dA.dtype is As[0].dtype else dA.to(As[0].dtype)]
    dtype = As[0].dtype
    if dA.dtype is not dtype and all([A.dtype is dtype for A in As]):
        dA = dA.to(dtype)
    each = dA.split([group.ranks[m] for m in group.adapted])
    return [d if d.dtype is A.dtype else d.to(A.dtype) for d, A in zip(each, As, strict=True)]


_once = once_differentiable(_backward)
# Without the look for torch.func transforms, which the caller has taken.
apply_flat = super(torch.autograd.Function, Flat).apply
