"""Three backends with one interface for the products with A and B, whose ranks are small.

Each backend is a module with these functions. X is [N, in]; S and dS are [N, width], the modules'
ranks side by side, module i's from column `first[i]` on.

    padded(rank, dtype)                           columns that a rank takes in S
    shrink(X, As, first, width, seed, dropout)    S = drop(X) A^T; and A as it was packed, or None
    expand(Ys, S, Bs, first, scalings, in_place)  Y_m + s_m S_m B_m^T
    grad_S(dYs, Bs, scalings, first, width)       dS_m = s_m dY_m B_m
    grad_B(dYs, S, first, ranks, scalings, dtypes)     dB_m = s_m dY_m^T S_m
    grad_X(dX, dS, As, first, packed, seed, dropout)   dX + drop(dS A)
    grad_A(dS, X, As, first, seed, dropout)       dA_m = dS_m^T drop(X)
    drop(X, seed, dropout)                        X where the mask keeps it, else 0

`torch` is plain aten: right for every device and dtype, and what policies, FLOP counters and other
dispatch modes see. `cpu` calls the C++ operators. `triton` launches kernels beside the vendor's
products.
"""

from collections.abc import Sequence

from torch import Tensor, dtype  # not `import torch`: that name is a module's of this package

Tensors = Sequence[Tensor]
Integers = Sequence[int]
Numbers = Sequence[float]
Dtypes = Sequence[dtype]
Seed = Tensor | None  # a seed, int64 [1], or a mask in X's dtype (dropout.py); None: no dropout
