"""K noisy copies of one linear layer: the product that they share once, plus a noise term each.

    y_k = x_k W^T + b + weight_std x_k E_k^T + bias_std e_k

W + E_k is never formed: in bfloat16 half of the noise would round away. The noise product is added
in place by the vendor's GEMM, which accumulates it and the base product in float32. Noise is made
once, apart: inside a GEMM every row tile would draw it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from adarank_kernels.random.philox import philox_normal
from adarank_kernels.random.reference import philox_normal_ref

Noise = tuple[Tensor, Tensor | None]  # for the weight, for the bias


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seeds: Sequence[int | tuple[int, int] | None] | None = None,
    noise: Sequence[Noise | None] | None = None,
    weight_std: float = 1.0,
    bias_std: float = 0.0,
    transposed: bool = False,
) -> Tensor:
    """`torch.nn.functional.linear` under K perturbations of weight and bias.

    Args:
        x: [K, N, in]. Expanded over K (stride 0): the base product is computed once.
        weight: [out, in], or [in, out] if `transposed` (Conv1D).
        bias: [out] or None.
        seeds: K entries, of which exactly one of `seeds` and `noise` is given. None: unperturbed;
            a pair: the Philox keys of weight and bias noise; one key: one stream for both, the
            bias after the weight. Noise is drawn in the parameter's own layout.
        noise: K entries instead of `seeds`, for those who use the same noise for many batches:
            (E, e) in the parameters' layouts and any floating dtype, e None for no bias noise;
            None: unperturbed.
        weight_std: what E is multiplied with.
        bias_std: what e is multiplied with.
        transposed: the layout of `weight` and of its noise.

    Returns:
        [K, N, out] in x's dtype. E is rounded to that dtype once, before it is scaled.

    Raises:
        ValueError: shapes, lengths or `seeds` / `noise` do not fit.
        TypeError: x and weight differ in dtype or are not floating point.
    """
    entries = _checked(x, weight, bias, seeds, noise, transposed)
    matrix = weight.t() if transposed else weight
    if x.shape[0] > 1 and x.stride(0) == 0:
        y = F.linear(x[0], matrix, bias).expand(x.shape[0], -1, -1).contiguous()
    else:
        y = F.linear(x, matrix, bias)
    for k, entry in enumerate(entries):
        if entry is None:
            continue
        E, e = _drawn(entry, weight, bias, philox_normal)
        E = E.to(x.dtype) if transposed else E.to(x.dtype).t()
        if e is None or not bias_std:
            y[k].addmm_(x[k], E, alpha=weight_std)
        else:  # together first: y is then rounded once more, not twice
            y[k].add_(torch.addmm((e * bias_std).to(x.dtype), x[k], E, alpha=weight_std))
    return y


def perturbed_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seeds: Sequence[int | tuple[int, int] | None] | None = None,
    noise: Sequence[Noise | None] | None = None,
    weight_std: float = 1.0,
    bias_std: float = 0.0,
    transposed: bool = False,
) -> Tensor:
    """`perturbed_linear` with the perturbed weights formed, in float64."""
    outputs = []
    entries = _checked(x, weight, bias, seeds, noise, transposed)
    for x_k, entry in zip(x.double(), entries, strict=True):
        W, b = weight.double(), None if bias is None else bias.double()
        if entry is not None:
            E, e = _drawn(entry, weight, bias, philox_normal_ref)
            W = W + weight_std * E.double()
            if b is not None and e is not None:
                b = b + bias_std * e.double()
        outputs.append(F.linear(x_k, W.t() if transposed else W, b))
    return torch.stack(outputs).to(x.dtype)


def _drawn(
    entry: int | tuple[int, int] | Noise,
    weight: Tensor,
    bias: Tensor | None,
    normal: Callable[..., Tensor],
) -> Noise:
    """Unit normals (or the caller's own noise) for weight and bias."""
    device = weight.device
    if isinstance(entry, int):
        outs = 0 if bias is None else bias.numel()
        stream = normal((weight.numel() + outs,), entry, device)
        e = None if bias is None else stream[weight.numel() :]
        return stream[: weight.numel()].view(weight.shape), e
    first, second = entry
    if isinstance(first, Tensor):
        assert not isinstance(second, int)
        return first, second
    return (
        normal(weight.shape, first, device),
        None if bias is None else normal(bias.shape, second, device),
    )


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seeds: Sequence[int | tuple[int, int] | None] | None,
    noise: Sequence[Noise | None] | None,
    transposed: bool,
) -> Sequence[int | tuple[int, int] | Noise | None]:
    """The K entries of `seeds` or `noise`, once everything fits."""
    if (seeds is None) == (noise is None):
        raise ValueError("give exactly one of seeds and noise")
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(
            f"x must be [K, N, in] and weight two-dimensional, got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise TypeError(
            f"x and weight must have one floating dtype, got {x.dtype} and {weight.dtype}"
        )
    ins, outs = weight.shape if transposed else weight.shape[::-1]
    if x.shape[2] != ins:
        raise ValueError(f"x has {x.shape[2]} features, weight takes {ins}")
    if bias is not None and bias.shape != (outs,):
        raise ValueError(f"bias must be [{outs}], got {tuple(bias.shape)}")
    entries = seeds if noise is None else noise
    assert entries is not None
    if len(entries) != x.shape[0]:
        name = "seeds" if noise is None else "noise"
        raise ValueError(f"{name} has {len(entries)} entries for the {x.shape[0]} variants of x")
    for pair in noise or ():
        if pair is None:
            continue
        if pair[0].shape != weight.shape:
            raise ValueError(
                f"noise for the weight must be {tuple(weight.shape)}, got {tuple(pair[0].shape)}"
            )
        if pair[1] is not None and pair[1].shape != (outs,):
            raise ValueError(f"noise for the bias must be [{outs}], got {tuple(pair[1].shape)}")
        if pair[1] is not None and bias is None:
            raise ValueError("noise has a part for the bias, and there is no bias")
    return entries
