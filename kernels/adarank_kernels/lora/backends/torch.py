"""The products with few ranks in aten: any device, any dtype, under any mode."""

from __future__ import annotations

import torch
from torch import Tensor

from adarank_kernels.lora.backends import Dtypes, Integers, Numbers, Seed, Tensors
from adarank_kernels.lora.dropout import is_mask, keep_mask


def padded(rank: int, dtype: torch.dtype) -> int:
    return rank


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # the call costs a microsecond


def pack(As: Tensors, first: Integers, width: int, dtype: torch.dtype) -> Tensor:
    """Stack [r, in] to [width, in] in the compute dtype; a lone A of that dtype is not copied.

    Rows beyond a module's rank repeat others: their columns of S are not read, of dS zero.
    """
    pieces: list[Tensor] = []
    for i, A in enumerate(As):
        stop = first[i + 1] if i + 1 < len(first) else width
        more = stop - first[i] - A.shape[0]
        pieces.append(A)
        if more > 0:
            pieces.append(A[:more] if more <= len(A) else A[:1].expand(more, -1))
    return cast(pieces[0] if len(pieces) == 1 else torch.cat(pieces), dtype)


def scaled_mm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The product scaling a b, rounded once."""
    if scaling == 1.0:
        return torch.mm(a, b)
    return torch.addmm(a.new_zeros(1, 1), a, b, beta=0.0, alpha=scaling)


def drop(X: Tensor, seed: Seed, dropout: float) -> Tensor:
    if seed is None:
        return X
    if is_mask(seed):
        return X * seed
    return X * keep_mask(seed, X.shape[0], X.shape[1], dropout)


def shrink(
    X: Tensor, As: Tensors, first: Integers, width: int, seed: Seed, dropout: float
) -> tuple[Tensor, Tensor | None]:
    A = pack(As, first, width, X.dtype)
    return torch.mm(drop(X, seed, dropout), A.t()), None


def expand(
    Ys: Tensors, S: Tensor, Bs: Tensors, first: Integers, scalings: Numbers, in_place: bool
) -> list[Tensor]:
    outputs = []
    for Y, B, start, scaling in zip(Ys, Bs, first, scalings, strict=True):
        S_m = S.narrow(1, start, B.shape[1])
        Bt = cast(B, S.dtype).t()
        if Y.dtype != S.dtype:  # a foreign base's own
            low = torch.mm(S_m, Bt)
            outputs.append(
                Y.add_(low, alpha=scaling) if in_place else (Y + scaling * low).to(Y.dtype)
            )
        elif in_place:
            outputs.append(Y.addmm_(S_m, Bt, alpha=scaling))
        else:
            outputs.append(torch.addmm(Y, S_m, Bt, alpha=scaling))
    return outputs


def grad_S(dYs: Tensors, Bs: Tensors, scalings: Numbers, first: Integers, width: int) -> Tensor:
    dtype = dYs[0].dtype
    parts = [scaled_mm(*of) for of in zip(dYs, [cast(B, dtype) for B in Bs], scalings, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def grad_B(
    dYs: Tensors, S: Tensor, first: Integers, ranks: Integers, scalings: Numbers, dtypes: Dtypes
) -> list[Tensor]:
    each = zip(dYs, first, ranks, scalings, dtypes, strict=True)
    return [
        cast(scaled_mm(dY.t(), S.narrow(1, start, rank), scaling), dtype)
        for dY, start, rank, scaling, dtype in each
    ]


def grad_X(
    dX: Tensor | None,
    dS: Tensor,
    As: Tensors,
    first: Integers,
    packed: Tensor | None,
    seed: Seed,
    dropout: float,
) -> Tensor:
    A = pack(As, first, dS.shape[1], dS.dtype) if packed is None else packed
    if seed is None:
        return torch.mm(dS, A) if dX is None else torch.addmm(dX, dS, A)
    low = drop(torch.mm(dS, A), seed, dropout)
    return low if dX is None else dX + low


def grad_A(
    dS: Tensor, X: Tensor, As: Tensors, first: Integers, seed: Seed, dropout: float
) -> list[Tensor]:
    return apart(torch.mm(dS.t(), drop(X, seed, dropout)), As, first)


def apart(stacked: Tensor, As: Tensors, first: Integers) -> list[Tensor]:
    """The modules' own parts of dA [width, in], in their dtypes."""
    return [
        cast(stacked.narrow(0, start, A.shape[0]), A.dtype)
        for A, start in zip(As, first, strict=True)
    ]
