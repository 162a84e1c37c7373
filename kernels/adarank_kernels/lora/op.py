"""M linears that share an input, each with a low-rank term of its own rank, as one autograd node.

    S     = drop(X) A^T                     one shrink: A = [A_1; ...; A_M] packed, S [N, sum r]
    Y_m   = X W_m^T + b_m + s_m S_m B_m^T   added into the base product where nobody else holds it

    dS_m  = s_m dY_m B_m                    into one packed [N, sum r]
    dX    = sum_m dY_m W_m + drop(dS A)     one buffer
    dA    = dS^T drop(X)                    one product for the group
    dB_m  = s_m dY_m^T S_m

Saved for backward: X, S and the parameters. drop is made again from its seed (dropout.py); its
scale 1 / (1 - p) rides on s_m. Products accumulate in float32 (float64 for float64).

A group is computed in one of three ways. *Whole*: each pass is one C++ call. *Flat*: a few aten
calls with aten's autograd, for few inputs where C++ cannot be built. *Stepwise*: operator by
operator, for trained bases, compilers, and wherever somebody watches operators (selective
checkpointing, a FLOP counter, any dispatch mode): there every product is an aten call and nothing
is written in place. docs/fusing.md has what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from adarank_kernels.lora.backends import cpu
from adarank_kernels.lora.backends import torch as aten
from adarank_kernels.lora.checks import check_arguments, check_lengths
from adarank_kernels.lora.dropout import is_mask
from adarank_kernels.lora.flat import flat
from adarank_kernels.lora.group import Group
from adarank_kernels.lora.node import Stepwise, whole

# Looked up once: they are called for every layer of every forward.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state


def run(
    group: Group, x: Tensor, seed: Tensor | None = None, bases: Sequence[Tensor | None] = ()
) -> Sequence[Tensor]:
    """The group's outputs for x, which `group.fits`; autocast is off.

    Args:
        group: the parameters.
        x: [..., in].
        seed: of the dropout mask, or what `group.draw` returned; None: drawn.
        bases: base products that were computed elsewhere (foreign ones), or none.
    """
    if group.dropout == 0.0 or not group.adapted:
        seed = None
    if torch.compiler.is_compiling():
        # A compiler sees through the node; the C++ operators stay what they are.
        backend, in_place = (cpu, True) if group.backend is cpu else (aten, False)
    elif is_watched(x):
        backend, in_place = aten, False
    else:
        outputs = quickly(group, x, seed, bases)
        if outputs:
            return outputs
        backend, in_place = group.backend, True
    seed = group.draw(x) if seed is None else seed
    return Stepwise.apply(group, backend, in_place, x, seed, *group.parts, *bases)


def quickly(
    group: Group, x: Tensor, seed: Tensor | None, bases: Sequence[Tensor | None] = ()
) -> Sequence[Tensor]:
    """As `run`, where nobody watches, for what has a quick way; else nothing.

    It looks itself at what may have changed of x and the parameters since the group was made.
    """
    if group.whole:
        return whole(group, x, seed, bases)
    if not group.flat or x.dtype is not group.dtype or not group.is_few(x):
        return ()
    if seed is not None and not is_mask(seed):
        return ()
    if bases and any([base is not None and base.dtype is not x.dtype for base in bases]):
        return ()
    if torch.is_autocast_enabled(group.device_type):
        return ()
    return flat(group, x, seed, bases)


def is_watched(x: Tensor) -> bool:
    """Whether somebody may look at, or stand in for, the operators of this call."""
    if _dispatch_modes() or _function_modes() or _transforms() or _tracing() is not None:
        return True
    kind = type(x)
    return kind is not Tensor and kind is not Parameter


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
    autocast = torch.is_autocast_enabled(device_type) and x.dtype != torch.float64
    if autocast:
        dtype = torch.get_autocast_dtype(device_type)  # as torch's linear: all to it, x once
        x = x.to(dtype)
        weights = [None if w is None else w.to(dtype) for w in weights]
        biases = [None if b is None else b.to(dtype) for b in biases]
    check_arguments(x, weights, lora_As, lora_Bs, biases, dropout, bases)
    group = Group(x, weights, biases, lora_As, lora_Bs, scalings, dropout)
    foreign = bases if any([base is not None for base in bases]) else ()
    if not autocast:
        return list(run(group, x, seed, foreign))
    with torch.autocast(device_type, enabled=False):
        return list(run(group, x, seed, foreign))


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
    """Compute x W^T + b + scaling drop(x) A^T B^T.

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
