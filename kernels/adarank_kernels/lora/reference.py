"""The LoRA linears in plain torch, differentiated by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from adarank_kernels.lora.dropout import draw_seed, keep_mask, keep_scale


def grouped_lora_linear_ref(
    x: Tensor,
    weights: Sequence[Tensor | None] | None,
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scalings: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    base_outputs: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """`grouped_lora_linear`, a module and an operation at a time, differentiated by torch."""
    dropped = x
    if dropout:
        seed = draw_seed(x.device) if seed is None else seed
        keep = keep_mask(seed, x.numel() // x.shape[-1], x.shape[-1], dropout).view(x.shape)
        dropped = x * keep * keep_scale(dropout)
    outputs = []
    for m, (A, B, scaling) in enumerate(zip(lora_As, lora_Bs, scalings, strict=True)):
        base = None if base_outputs is None else base_outputs[m]
        if base is None:
            assert weights is not None
            weight = weights[m]
            assert weight is not None
            base = F.linear(x, weight, None if biases is None else biases[m])
        if A is not None and B is not None:
            low_rank = F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype)) * scaling
            base = (base + low_rank).to(base.dtype)
        outputs.append(base)
    return outputs


def lora_linear_ref(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    base_output: Tensor | None = None,
) -> Tensor:
    """`lora_linear` in plain torch: the same arguments, shapes and dtypes, slower."""
    return grouped_lora_linear_ref(
        x,
        [weight],
        [lora_A],
        [lora_B],
        [scaling],
        [bias],
        dropout=dropout,
        seed=seed,
        base_outputs=[base_output],
    )[0]
