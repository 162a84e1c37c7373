"""M linears that share an input, each with a low-rank term of its own rank, as one autograd node.

    S     = drop(X) A^T                     one shrink: A = [A_1; ...; A_M] packed, S [N, sum r]
    Y_m   = X W_m^T + b_m + s_m S_m B_m^T   added in place into the base product

    dS_m  = s_m dY_m B_m                    into one packed [N, sum r]
    dX    = sum_m dY_m W_m + drop(dS A)     one buffer
    dA    = dS^T drop(X)                    one product for the group
    dB_m  = s_m (S_m^T dY_m)^T

Saved for backward: X, S and the parameters. drop is made again from its seed (_dropout.py); its
scale 1 / (1 - p) rides on s_m. Products accumulate in float32 (float64 for float64).

On the CPU, in eager mode, the group is *folded*, because passes cost more than their arithmetic:
s_m is multiplied into B_m, so that no product has a factor of its own (each costs a pass in bf16),
and b_m is a last column of B_m beside a column of ones in S (a bias of its own costs as much as the
low-rank product). docs/fusing.md has what was measured, also for the forms of the products.


One linear with a low-rank term: the group of one (see grouped_lora.py for the maths)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adarank_kernels.lora import skinny as _skinny
from adarank_kernels.lora.checks import check_arguments, check_lengths
from adarank_kernels.lora.dropout import draw_seed, keep_scale
from adarank_kernels.lora.function import GroupedLoraLinear
from adarank_kernels.lora.parts import Spec, ready_kernels
from adarank_kernels.runtime.registry import INTERPRETED


class Prepared:
    """A checked call, kept: the same parameters on any number of rows, without the checks.

    `fits(x)` says whether a call with x would pass them; `seed` is drawn anew in each call.
    """

    __slots__ = ("spec", "tensors", "_native", "_dtypes", "_width", "_dtype", "_device")

    def __init__(self, spec: Spec, x: Tensor, tensors: tuple[Tensor | None, ...]) -> None:
        self.spec, self.tensors = spec, tensors
        self._native = _native_spec(spec, x, tensors)
        self._dtypes = [(t, t.dtype, t.device) for t in tensors if t is not None]
        self._width, self._dtype, self._device = x.shape[-1], x.dtype, x.device

    def fits(self, x: Tensor) -> bool:
        """Whether x, the parameters' dtypes and devices and autocast are as they were checked."""
        if x.dtype != self._dtype or x.shape[-1] != self._width or x.device != self._device:
            return False
        if torch.is_autocast_enabled(self._device.type):
            return False
        return all(t.dtype == dtype and t.device == device for t, dtype, device in self._dtypes)

    def __call__(self, x: Tensor, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        spec = self.spec
        kernels = ready_kernels(x)
        if self._native is not None and _skinny.usable(x):
            spec = self._native
        elif kernels != spec.kernels:
            spec = self.spec = spec.placed(kernels=kernels)
        if spec.dropout == 0.0 or not spec.adapted:
            seed = None
        elif seed is None:
            seed = draw_seed(x.device)
        return GroupedLoraLinear.apply(spec, x, seed, *self.tensors)


def _native_spec(spec: Spec, x: Tensor, tensors: tuple[Tensor | None, ...]) -> Spec | None:
    """`spec` with the products of `_skinny`, if these know the tensors' types."""
    if not spec.folded or not spec.adapted:
        return None
    M, dtypes = len(spec.ranks), (x.dtype, torch.float32)
    _, biases, lora_As, lora_Bs, bases = (tensors[i * M : i * M + M] for i in range(5))
    for m in spec.adapted:
        A, B = lora_As[m], lora_Bs[m]
        assert A is not None and B is not None
        if A.dtype not in dtypes or B.dtype not in dtypes:
            return None
        if any(t is not None and t.dtype != x.dtype for t in (biases[m], bases[m])):
            return None
    return spec.placed(native=True)


def prepare(
    x: Tensor,
    weights: Sequence[Tensor | None],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scalings: Sequence[float],
    biases: Sequence[Tensor | None],
    dropout: float,
    bases: Sequence[Tensor | None] = (),
) -> Prepared:
    """Check the arguments of `grouped_lora_linear`, autocast aside, for this call and others."""
    bases = bases or [None] * len(lora_As)
    check_arguments(x, weights, lora_As, lora_Bs, biases, dropout, bases)
    scale = keep_scale(dropout)
    ranks = tuple(0 if A is None else A.shape[0] for A in lora_As)
    folded = x.device.type == "cpu" and not (INTERPRETED or torch.compiler.is_compiling())
    spec = Spec(
        ranks,
        tuple(float(s) * scale for s in scalings),
        float(dropout),
        tuple(m for m, rank in enumerate(ranks) if rank),
        tuple(None if A is None else A.dtype for A in lora_As),
        tuple(None if B is None else B.dtype for B in lora_Bs),
        folded,
        tuple(
            m
            for m, bias in enumerate(biases)
            if folded and ranks[m] and bases[m] is None and bias is not None
            if bias.dtype == x.dtype
        ),
        ready_kernels(x),
    ).placed()
    return Prepared(spec, x, (*weights, *biases, *lora_As, *lora_Bs, *bases))


def grouped_lora_linear(
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
    """M linears of one input, each with a low-rank term: x W_m^T + b_m + s_m drop(x) A_m^T B_m^T.

    Ranks and widths may all differ. One autograd node for the group, which keeps x and the packed
    [N, sum r] product for backward (on CUDA the packed A as well), and does no work for gradients
    that nobody needs.

    Args:
        x: [..., in], any strides; N rows in all, none included.
        weights: M of [out_m, in], in x's dtype, any strides (a transposed view is not copied).
            None, or a None in the list, where `base_outputs` has the product.
        lora_As: M of [r_m, in], any floating dtype; None: no adapter.
        lora_Bs: M of [out_m, r_m], likewise; cast to x's dtype, gradients in their own.
        scalings: M numbers s_m.
        biases: M of [out_m] or None.
        dropout: probability of dropping an element of x on the low-rank path; one mask a group.
        seed: int64 tensor with one element on x's device that fixes the mask; None: drawn from
            torch's generator of that device.
        base_outputs: M base products [..., out_m] made elsewhere (a quantised base, say), or None
            for those to be computed here. **Consumed**: written into where autograd allows it. The
            part of the gradient of x that runs through them flows by their own graph.

    Returns:
        M outputs [..., out_m].

    Raises:
        ValueError: shapes that do not fit, tensors on several devices, dropout outside [0, 1].
        TypeError: integer inputs, weights that are not of x's dtype.
    """
    M = len(lora_As)
    weights = [None] * M if weights is None else list(weights)
    biases = [None] * M if biases is None else list(biases)
    bases = [None] * M if base_outputs is None else list(base_outputs)
    check_lengths(
        M, weights=weights, lora_Bs=lora_Bs, scalings=scalings, biases=biases, base_outputs=bases
    )
    if M == 0:
        return []
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return list(
            prepare(x, weights, lora_As, lora_Bs, scalings, biases, dropout, bases)(x, seed)
        )
    dtype = torch.get_autocast_dtype(device_type)  # as torch's linear: all to it, x once
    x = x.to(dtype)
    weights = [None if w is None else w.to(dtype) for w in weights]
    biases = [None if b is None else b.to(dtype) for b in biases]
    call = prepare(x, weights, lora_As, lora_Bs, scalings, biases, dropout, bases)
    with torch.autocast(device_type, enabled=False):
        return list(call(x, seed))


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
