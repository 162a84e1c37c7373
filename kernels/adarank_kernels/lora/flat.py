"""A group in as few aten calls as it takes, with aten's own autograd: where C++ cannot be built.

For inputs so few that the host takes longer than the device (`Group.is_few`). A node of ours in
Python costs the host more than the passes over memory that it saves. The maths is in op.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adarank_kernels.lora.dropout import draw_mask
from adarank_kernels.lora.group import Group


def flat(
    group: Group, x: Tensor, mask: Tensor | None, bases: Sequence[Tensor | None]
) -> list[Tensor]:
    """The outputs of all modules, [..., out]; `mask` is x's ([N, in]), drawn if there is none."""
    shape, parts, dtype = x.shape, group.parts, group.dtype
    X = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    dropped = X
    if group.dropout and group.adapted:
        dropped = X * (draw_mask(X, group.keep) if mask is None else mask)
    outputs, at = [], 0
    for m, scaling in enumerate(group.scalings):
        weight, bias, A, B = parts[at : at + 4]
        at += 4
        base = bases[m] if bases else None
        if base is not None:
            Y = base.reshape(-1, base.shape[-1])
        else:
            assert weight is not None
            Y = torch.mm(X, weight.t()) if bias is None else torch.addmm(bias, X, weight.t())
        if A is not None and B is not None:
            if A.dtype is not dtype:
                A = A.to(dtype)
            if B.dtype is not dtype:
                B = B.to(dtype)
            S = torch.mm(dropped, A.t())
            if not group.alphas[m]:  # aten would round dB, multiply and round again
                Y = torch.addmm(Y, S * scaling, B.t())
            else:
                Y = torch.addmm(Y, S, B.t(), alpha=scaling)
        elif base is not None:
            Y = Y.clone()
        outputs.append(Y if len(shape) == 2 else Y.view(*shape[:-1], Y.shape[-1]))
    return outputs
