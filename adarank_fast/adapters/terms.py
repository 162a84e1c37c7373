"""What a layer's active adapters add to its base product, as one low-rank term.

Several adapters lie side by side, their scalings in the columns of B. `lora_bias` is added to the
base bias. Of BD-LoRA the whole of a block-diagonal B is made. DoRA multiplies the sum of base
product and low-rank product:

    Y = m (X W^T + s X A^T B^T) + b,   m = magnitude / ||W + s B A||   (rows; no gradient)

which is PEFT's `DoraLinearLayer` without dropout, in one pass over Y instead of six.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adarank_fast.adapters.peft_private import BlockDiagonalLinear, DoraLinearVariant, Layer


class Adapter(NamedTuple):
    """The parameters of one adapter in one layer: A [r, in], B [out, r], bias and magnitude [out].

    `magnitude` is DoRA's, `bias` that of `lora_bias`; None: none. B may be the stacked `blocks` of
    a diagonal.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    magnitude: Tensor | None
    blocks: int = 1

    def whole_B(self) -> Tensor:
        """[out, r], with what lies off the diagonal."""
        return self.B if self.blocks == 1 else torch.block_diag(*self.B.chunk(self.blocks))


def names_of(layer: Layer) -> list[str]:
    """The active adapters that this layer has, in the order in which PEFT adds them."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def adapters_of(layer: Layer) -> list[Adapter]:
    """The layer's active adapters."""
    found = []
    for name in names_of(layer):
        lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
        magnitude = layer.lora_magnitude_vector[name].weight if is_dora(layer, name) else None
        bias, scaling = getattr(lora_B, "bias", None), layer.scaling[name]
        blocks = blocks_of(lora_B)
        found.append(Adapter(lora_A.weight, lora_B.weight, bias, scaling, magnitude, blocks))
    return found


def is_dora(layer: Layer, name: str) -> bool:
    """Whether the adapter is one of DoRA."""
    return isinstance(layer.lora_variant.get(name), DoraLinearVariant)


def blocks_of(module: nn.Module) -> int:
    """How many blocks a `lora_B` has on its diagonal; 1 for a whole matrix."""
    return module.nblocks if isinstance(module, BlockDiagonalLinear) else 1


def has_plain_base(layer: Layer) -> bool:
    """A weight to multiply with; otherwise (quantised) the base layer computes its own product."""
    base = layer.base_layer
    plain_class = type(base) is nn.Linear or type(base).__name__ == "Conv1D"
    return plain_class and is_plain(base.weight)


def is_plain(parameter: Tensor) -> bool:
    """No DTensor, no quantised subclass."""
    return type(parameter) in (nn.Parameter, Tensor)


def weight_of(layer: Layer) -> Tensor:
    """[out, in] of a plain base; a view for a Conv1D."""
    base = layer.base_layer
    weight: Tensor = base.weight
    return weight if type(base) is nn.Linear else weight.t()


def low_rank(adapters: Sequence[Adapter]) -> tuple[Tensor | None, Tensor | None, float | Tensor]:
    """(A [sum r, in], B [out, sum r], scaling) of the sum of their products; None without any."""
    if not adapters:
        return None, None, 0.0
    if len(adapters) == 1:
        return adapters[0].A, adapters[0].whole_B(), adapters[0].scaling
    A = torch.cat([adapter.A for adapter in adapters])
    return A, torch.cat([adapter.whole_B() * adapter.scaling for adapter in adapters], 1), 1.0


def bias_of(bias: Tensor | None, adapters: Sequence[Adapter], dtype: torch.dtype) -> Tensor | None:
    """What the operator adds: the base bias and each scaled `lora_bias`, [out].

    For DoRA with gaps between its elements. Then it is added in the base product, as the base does
    it, and not after it, which rounds otherwise: a new adapter must change no bit.
    """
    own = [adapter.bias * adapter.scaling for adapter in adapters if adapter.bias is not None]
    if own:
        bias = sum(own[1:] if bias is None else own, own[0] if bias is None else bias).to(dtype)
    if bias is not None and adapters and adapters[0].magnitude is not None:
        return torch.stack([bias, bias], 1)[:, 0]
    return bias


def finished(
    Y: Tensor, weight: Tensor | None, bias: Tensor | None, adapters: Sequence[Adapter]
) -> Tensor:
    """The layer's output from the operator's, [..., out].

    Args:
        Y: [..., out].
        weight: the base's, [out, in]; None for a base layer with a product of its own.
        bias: the base's, [out], or None.
        adapters: the layer's.
    """
    if weight is None:
        own = bias_of(None, adapters, Y.dtype)
        return Y if own is None else Y + own
    if adapters and adapters[0].magnitude is not None:
        return _magnified(Y, weight, bias, adapters[0])
    return Y


def _magnified(Y: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """DoRA's output from Y = X W^T + b + s X A^T B^T.

    Computed as Y + (m - 1) (Y - b). bfloat16 has 8 bits of precision: it would round away how far
    m is from 1, but it keeps m - 1. A new adapter has m = 1 and changes no bit.
    """
    A, B, _, scaling, magnitude, _ = adapter
    assert magnitude is not None
    with torch.autocast(Y.device.type, enabled=False):
        with torch.no_grad():
            sum_of_both = torch.addmm(weight.to(A.dtype), B.to(A.dtype), A, alpha=float(scaling))
            norm = torch.linalg.vector_norm(sum_of_both, dim=1, dtype=_exact(A.dtype))
        factor: Tensor = magnitude / norm
        if bias is None and Y.dtype == _exact(Y.dtype):  # one pass less
            output: Tensor = Y * factor.to(Y.dtype)
            return output
        beyond = (factor - 1).to(Y.dtype)
        output = torch.addcmul(Y, Y if bias is None else Y - bias.to(Y.dtype), beyond)
        return output


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
