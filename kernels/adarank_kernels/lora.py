"""One linear with a low-rank term: the group of one (see grouped_lora.py for the maths)."""

from __future__ import annotations

from torch import Tensor

from adarank_kernels.grouped_lora import grouped_lora_linear, grouped_lora_linear_ref


def lora_linear(
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
    """x W^T + b + scaling drop(x) A^T B^T.

    Args:
        x: [..., in].
        weight: [out, in] in x's dtype; None where `base_output` has the product.
        lora_A: [r, in], any floating dtype, or None for no adapter.
        lora_B: [out, r], likewise.
        scaling: of the low-rank term.
        bias: [out] or None.
        dropout: probability of dropping an element of x on the low-rank path.
        seed: int64 tensor with one element that fixes the mask; None: from torch's generator.
        base_output: [..., out], a base product made elsewhere; consumed.

    Returns:
        [..., out].

    Raises:
        ValueError, TypeError: as `grouped_lora_linear`, whose group of one this is.
    """
    return grouped_lora_linear(
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
    """`lora_linear` in plain torch."""
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
