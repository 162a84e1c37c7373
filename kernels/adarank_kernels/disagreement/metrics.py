"""Distances between outputs in memory: [R, tokens, V] -> float64 [R, R, tokens] of all pairs.

With pairs=False [R - 1, tokens]: row 0 with each of the others, kl as KL(p_k || p_0).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adarank_kernels.runtime.registry import DTYPES, HAS_TRITON, INTERPRETED, ready

if HAS_TRITON:
    from adarank_kernels.disagreement import triton

RULED_OUT = -30.0  # of a log-probability: e^-30 adds nothing to a float32 sum


def has_kernel(R: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel compares R rows of outputs in `dtype`: float32 is welcome there."""
    if not HAS_TRITON or not (device.type == "cuda" or INTERPRETED) or R > triton.MAX_ROWS:
        return False
    return dtype != torch.float64 and ready("disagreement_pairs", device, DTYPES[0])


def compare(f: Tensor, metric: str, pairs: bool, working: torch.dtype) -> Tensor:
    """Outputs [R, s, V] -> float64 [R, R, s], or [R - 1, s]; l1 summed over V.

    Functions of the outputs are taken in float64, their small differences to row 0 and those of
    each other in `working`.
    """
    if metric == "l1":
        return l1(f, pairs, infinite=f.is_cuda or not bool(f.isfinite().all()))
    if metric == "tv":
        p = f.softmax(-1, dtype=torch.float64)
        return l1((p - p[0]).to(working), pairs) / 2
    if metric == "argmax":
        return _argmax(f, pairs)
    return (_kl if metric == "kl" else _js)(f.double(), pairs)


def _pairwise(distance: Callable[[Tensor, Tensor], Tensor], f: Tensor, pairs: bool) -> Tensor:
    """A symmetric distance of rows [R, s, ...]; rows (i, i + shift) in one go."""
    R, s = f.shape[:2]
    if not pairs:
        return distance(f[1:], f[:1])
    found = f.new_zeros(R, R, s, dtype=torch.float64)
    for shift in range(1, R):
        found.diagonal(shift).copy_(distance(f[shift:], f[:-shift]).t())
        found.diagonal(-shift).copy_(found.diagonal(shift))
    return found


def l1(f: Tensor, pairs: bool, infinite: bool = False) -> Tensor:
    """sum_v |f_i - f_j|; where there may be `infinite` ones, equal ones are no difference."""
    if has_kernel(len(f), f.device, f.dtype):
        return triton.compare(f, "l1", pairs)
    buffer = f.new_empty(f[1:].shape)  # fresh memory for each pair costs more than the pair

    def distance(f: Tensor, g: Tensor) -> Tensor:
        difference = torch.sub(f, g, out=buffer[: len(f)]).abs_()
        if infinite:
            difference.nan_to_num_(nan=0.0, posinf=torch.inf)
        return difference.sum(-1).double()

    return _pairwise(distance, f, pairs)


def _argmax(f: Tensor, pairs: bool) -> Tensor:
    largest, index = f.max(-1)
    index = index.double().masked_fill_(largest.isnan(), torch.nan)
    return _pairwise(lambda i, j: (i != j).double() + 0 * (i + j), index, pairs)  # NaN stays


def _kl(f: Tensor, pairs: bool) -> Tensor:
    """KL as sum p_i log p_i - sum p_i log p_j, both relative to log p_0: one product per token."""
    log_p = f.log_softmax(-1)
    p, excluded = log_p.exp(), log_p == -torch.inf
    log_p.masked_fill_(excluded, 0)
    if pairs:
        log_p, p = log_p - log_p[0], p.transpose(0, 1)
        cross, lost = (
            torch.bmm(p, x.to(p).permute(1, 2, 0)).permute(1, 2, 0) for x in (log_p, excluded)
        )
        found = cross.diagonal().t()[:, None] - cross
    else:
        found = (p[1:] * (log_p[1:] - log_p[0])).sum(-1)
        lost = (p[1:] * excluded[0]).sum(-1)
    return found.clamp_min_(0).masked_fill_(lost > 0, torch.inf)


def _js(f: Tensor, pairs: bool) -> Tensor:
    entropy: Callable[[Tensor], Tensor] = torch.special.entr

    p = f.softmax(-1)
    own = entropy(p).sum(-1)
    mixed = _pairwise(lambda p, q: entropy((p + q).div_(2)).sum(-1), p, pairs)
    if not pairs:
        return (mixed - (own[1:] + own[0]) / 2).clamp_min_(0)
    found = (mixed - (own + own[:, None]) / 2).clamp_min_(0)
    found.diagonal().mul_(0)
    return found


def tv_of_deltas(f: Tensor, p: Tensor, pairs: bool) -> Tensor:
    """Total variation between p and p_k ~ p exp(f_k), k > 0; overwrites f.

    f is [R, s, V], p [s, V], both float32.

    p_k - p = p (e_k - z_k) / (1 + z_k), e_k = exp(f_k - a_k) - 1, z_k = sum p e_k, for any a_k.
    With a_k = sum p f_k, e_k is small where p is not: every term keeps its digits, also where all
    outputs moved by 20, so float32 is enough.
    """

    def mean(f: Tensor) -> Tensor:
        """sum_v p f: [R - 1, s, 1]."""
        return torch.matmul(f.transpose(0, 1), p[..., None]).transpose(0, 1)

    e = f[1:]
    e.sub_(mean(e)).expm1_()
    z = mean(e)
    e.sub_(z)
    if not pairs:  # a matrix product would add up as many positive terms less exactly
        return (e.abs_().mul_(p).sum(-1) / (1 + z[..., 0])).double() / 2
    e.mul_(1 / (1 + z)).mul_(p)
    f[0] = 0
    return l1(f, pairs) / 2


def relative(logits: Tensor, far: Tensor, bias: Tensor | None, metric: str, pairs: bool) -> Tensor:
    """tv, kl or js of logits [R, c, V] float32 by a kernel, relative to row 0; overwrites row 0.

    Rows k > 0 are differences to row 0 or, where `far` [c], logits without bias as row 0 is.
    """
    log_p = logits[0].double()
    if bias is not None:
        log_p += bias
    lse = log_p.logsumexp(-1, keepdim=True)
    base = (log_p - lse).clamp_min_(RULED_OUT).float()  # any finite value will do
    # what is added to rows with logits of their own
    added = log_p.new_zeros(()) if bias is None else bias.double()
    shift = torch.where(far[:, None], added, log_p, out=log_p).sub_(lse).sub_(base).float()
    del log_p
    logits[0].masked_fill_(~far[:, None], 0)
    return triton.compare(logits, metric, pairs, shift, base)
