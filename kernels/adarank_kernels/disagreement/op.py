"""How far apart K variants' outputs are: hidden states [K, N, D] -> [K, K], head included.

    f_k = H_k W^T + b (or H_k itself), p_k = softmax(f_k); per token, then over tokens
    l1 (i, j)  mean_v |f_i - f_j|
    tv         1/2 sum_v |p_i - p_j|
    kl         sum_v p_i (log p_i - log p_j)                       row i, column j
    js         entropy((p_i + p_j) / 2) - (entropy(p_i) + entropy(p_j)) / 2
    argmax     argmax_v f_i != argmax_v f_j

Probing compares outputs that differ in their sixth digit. So the head is applied to a centre C (the
reference, else variant 0) and to H_k - C, taken in float32:

    f_k - f_j = (H_k - C) W^T - (H_j - C) W^T       l1: the centre and the bias drop out
    f_k       = (C W^T + b) + (H_k - C) W^T         added in float64, normalised there

A product's rounding is then relative to the difference, not to the logit, and softmax, entropies
and divergences lose nothing to cancellation. Every finite centre is right, so a non-finite one is
replaced by zeros and spoils no other variant.

Logits exist for one chunk of tokens at a time; l1 sees one block of outputs of a chunk at a time.
Distances between outputs in memory are in metrics.py, their Triton kernels in triton.py. On CUDA a
call waits for the device where a mask says which tokens count and, where no kernel compares the
logits of tv, once a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adarank_kernels.disagreement import metrics
from adarank_kernels.disagreement.choices import METRICS
from adarank_kernels.errors import AdarankError, AdarankTypeError

LOGITS_BYTES = 80 << 20  # of a token chunk's logits
CACHE_BYTES = 2 << 20  # of an operand of the elementwise passes
ROWS = 512  # of a product whose outputs are needed only block by block
LARGE = 30.0  # moves of a token's logits that differ by more are exponentiated in float64
OUTPUTS = 4096  # of a block; wider products take more time per output (measured)

# On CUDA few launches count more. A chunk has at most GPU_BYTES of outputs, and all that it holds
# is at most GPU_SHARE of [K, N, V] in hidden's dtype, or GPU_LEAST_BYTES where that is less.
GPU_BYTES = 256 << 20
GPU_LEAST_BYTES = 64 << 20
GPU_SHARE = 0.1
GPU_OUTPUTS = 16384  # of a block


def pairwise_disagreement(
    hidden: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    metric: str = "l1",
    mask: Tensor | None = None,
    reference: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """How far apart the outputs of K variants are, without forming [K, N, V].

    Not differentiable. The same bits on every run of the same shapes.

    Args:
        hidden: [K, N, D], floating point, any strides. K >= 2, or K >= 1 with a reference.
        weight: head [V, D], cast to hidden's dtype; None: `hidden` is the output, V = D.
        bias: [V]; only with a weight.
        metric: "l1" mean over outputs of |f_i - f_j|; "tv" half the sum of |p_i - p_j|,
            p = softmax(f); "kl" KL(p_i || p_j) in nats, row i and column j; "js" Jensen-Shannon in
            nats; "argmax" 1 where the largest outputs differ (lowest index on ties).
        mask: [N], zero where a token does not count; what it holds is then never read.
        reference: [N, D] in hidden's dtype: each variant against it only, kl as KL(p_k || p_ref).
        reduction: "mean" over tokens; "sum", which merges over batches; "none", each token's own
            value, masked ones zero (needs a reference).

    Returns:
        [K, K], diagonal zero, symmetric but for kl; with a reference [K], or [K, N] for "none".
        float32 (float64 for float64 hidden and for "none"). A class with logit -inf has
        probability 0; kl is inf where p_i has a class that p_j rules out. NaN in a variant (with a
        head: any non-finite value) gives NaN in all its entries and in no others.

    Raises:
        AdarankError: shapes that do not fit, tensors on several devices, an unknown name, no token
            left, too few variants.
        AdarankTypeError: `hidden`, `weight`, `bias` or `reference` of a wrong dtype.
    """
    check(hidden, weight, bias, metric, mask, reference, reduction)
    with torch.no_grad():
        kept = None if mask is None else kept_tokens(mask)
        tokens = hidden.shape[1] if kept is None else len(kept)
        head = None if weight is None else (weight, bias)
        R, working = len(hidden) + (reference is not None), _working(hidden.dtype)
        kernel = metrics.has_kernel(R, hidden.device, working)
        V = None if weight is None else len(weight)
        device, D = hidden.device.type, hidden.shape[2]
        step = chunk_tokens(device, R, tokens, D, V, metric, hidden.dtype, kernel)
        several = step * chunks_at_once(device, R, tokens, D, V, hidden.dtype, step)
        parts, total = [], hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, tokens, several):
            stop = start + several
            chosen = slice(start, stop) if kept is None else kept[start:stop]
            rows = hidden[:, chosen]
            if reference is not None:
                rows = torch.cat([reference[chosen][None], rows])
            values = _compare(rows, head, metric, reference is None, step)
            if reference is None:
                total = total + values.sum(-1)
            else:
                parts.append(values)
        if reference is not None:
            values = torch.cat(parts, -1)
            if reduction == "none":
                if kept is None:
                    return values
                return values.new_zeros(hidden.shape[:2]).index_copy_(1, kept, values)
            total = values.sum(-1)
        total = total / tokens if reduction == "mean" else total
        return total if hidden.dtype == torch.float64 else total.float()


def check(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    metric: str,
    mask: Tensor | None,
    reference: Tensor | None,
    reduction: str,
) -> None:
    """Refuse tensors whose shapes, dtypes or devices do not go together, and unknown names."""
    if hidden.dim() != 3:
        raise AdarankError(f"hidden must be [K, N, D], got {list(hidden.shape)}")
    K, N, D = hidden.shape
    tensors = {"hidden": hidden, "weight": weight, "bias": bias, "reference": reference}
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise AdarankTypeError(f"{name} must be floating point, got {tensor.dtype}")
    for name, tensor in (tensors | {"mask": mask}).items():
        if tensor is not None and tensor.device != hidden.device:
            raise AdarankError(f"{name} is on {tensor.device}, hidden on {hidden.device}")
    if metric not in METRICS:
        raise AdarankError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if reduction not in ("mean", "sum", "none"):
        raise AdarankError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if reduction == "none" and reference is None:
        raise AdarankError("reduction='none' gives [K, N] and needs a reference")
    if weight is not None and (weight.dim() != 2 or weight.shape[1] != D):
        raise AdarankError(f"weight must be [V, {D}] to fit hidden, got {list(weight.shape)}")
    if bias is not None and (weight is None or bias.shape != weight.shape[:1]):
        fits = "None without a weight" if weight is None else f"[{weight.shape[0]}]"
        raise AdarankError(f"bias must be {fits}, got {list(bias.shape)}")
    if mask is not None and mask.shape != (N,):
        raise AdarankError(f"mask must be [{N}] to fit hidden, got {list(mask.shape)}")
    if reference is not None and reference.shape != (N, D):
        raise AdarankError(f"reference must be {[N, D]} to fit hidden, got {list(reference.shape)}")
    if reference is not None and reference.dtype != hidden.dtype:
        raise AdarankTypeError(f"reference must be {hidden.dtype} as hidden, got {reference.dtype}")
    if K < (2 if reference is None else 1):
        raise AdarankError(
            f"hidden must hold at least two variants, or one and a reference; K = {K}"
        )
    if 0 in (N, D) or (weight is not None and weight.shape[0] == 0):
        raise AdarankError(f"nothing to compare: hidden is {[K, N, D]}, outputs must not be empty")


def kept_tokens(mask: Tensor) -> Tensor:
    """Indices of the tokens that count; their number is known to the host afterwards."""
    kept = mask.nonzero().flatten()
    if len(kept) == 0:
        raise AdarankError(f"mask leaves none of {len(mask)} tokens; nothing to compare")
    return kept


def chunk_tokens(
    device: str,
    R: int,
    tokens: int,
    features: int,
    outputs: int | None,
    metric: str,
    dtype: torch.dtype,
    kernel: bool,
) -> int:
    """How many of the tokens of R rows to compare at once: a function of sizes alone.

    Args:
        device: its type; "cuda" has a memory bound of its own.
        R: variants, the reference included.
        tokens: all that count.
        features: D of hidden.
        outputs: V of the head; None without one.
        metric: as in `pairwise_disagreement`.
        dtype: of hidden.
        kernel: whether the Triton kernel compares the outputs.
    """
    V, in_blocks = outputs or features, metric == "l1" and outputs is not None
    size = _working(dtype).itemsize
    if device == "cuda":
        width = min(V, GPU_OUTPUTS) if in_blocks else V
        held = R * (
            held_copies(metric, kernel) * width * size + features * (2 * size + dtype.itemsize)
        )
        bound = _gpu_bound(R, tokens, V, dtype)
        if outputs is not None:  # the rest is for `chunks_at_once`
            bound = 3 * bound // 4
        return max(1, min(GPU_BYTES // (R * max(width, features) * size), bound // held))
    if in_blocks:
        return max(1, ROWS // R)
    space = LOGITS_BYTES // 8 if outputs is None else LOGITS_BYTES  # no product to feed
    return max(1, space // (R * V * size))


def chunks_at_once(
    device: str,
    R: int,
    tokens: int,
    features: int,
    outputs: int | None,
    dtype: torch.dtype,
    step: int,
) -> int:
    """How many chunks of `step` tokens have their differences taken in one go; arguments as above.

    On CUDA these passes are launches that a chunk can do without, in a quarter of the memory.
    """
    if device != "cuda" or outputs is None:
        return 1
    held = R * features * (2 * _working(dtype).itemsize + dtype.itemsize)
    return max(1, _gpu_bound(R, tokens, outputs, dtype) // 4 // held // step)


def _gpu_bound(R: int, tokens: int, outputs: int, dtype: torch.dtype) -> int:
    return max(GPU_LEAST_BYTES, int(GPU_SHARE * R * tokens * outputs * dtype.itemsize))


def held_copies(metric: str, kernel: bool) -> int:
    """How many times a chunk's outputs a comparison on CUDA holds at its peak, in their own dtype.

    With a kernel for tv, kl and js beside them float64 log-probabilities of row 0; without one
    differences in l1, and passes in float64 elsewhere.
    """
    if metric == "l1":
        return 1 if kernel else 2
    if metric == "argmax":
        return 4
    return 2 if kernel else 12


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compare(
    rows: Tensor,
    head: tuple[Tensor, Tensor | None] | None,
    metric: str,
    pairs: bool,
    step: int,
) -> Tensor:
    """Disagreement of rows [R, c, D]: [R, R, c] of all pairs, or [R - 1, c] of row 0; float64.

    With a head `step` tokens at a time.
    """
    divergence = metric in ("tv", "kl", "js")
    working = _working(rows.dtype)
    if head is not None:
        bad = ~rows.isfinite().all(-1)
    else:
        largest = rows.amax(-1)  # NaN if there is one
        bad = largest.isnan()
        if divergence:
            bad |= largest.isinf()  # no distribution
    dtype = rows.dtype
    rows = rows.to(working).masked_fill(bad[..., None], 0)
    if head is None and divergence and metrics.has_kernel(len(rows), rows.device, working):
        found = metrics.relative(rows, torch.ones_like(bad[0]), None, metric, pairs)
    elif head is None:
        values = [metrics.compare(part, metric, pairs, working) for part in _parts(rows)]
        found = torch.cat(values, -1)
    else:
        far = _far(rows)
        rows[1:] -= rows[0].masked_fill(far[:, None], 0)
        pieces = rows.split(step, dim=1)
        if metric == "l1":
            rows[0].masked_fill_(~far[:, None], 0)
            # a GPU multiplies zeros sooner than it answers
            first = 0 if rows.is_cuda or far.any() else 1
            values = [_compare_deltas(piece, head[0], dtype, pairs, first) for piece in pieces]
        else:
            both = zip(pieces, far.split(step), strict=True)
            values = [_compare_logits(*each, *head, dtype, metric, pairs) for each in both]
        found = torch.cat(values, -1)
    if metric == "l1":
        found /= rows.shape[2] if head is None else len(head[0])
    bad = bad | bad[:, None] if pairs else bad[1:] | bad[:1]
    found.masked_fill_(bad, torch.nan)
    return found


def _far(rows: Tensor) -> Tensor:
    """[c]: where differences to row 0 of [R, c, D] would carry more rounding than the rows do.

    A difference is rounded, and so is its product; of the row itself only the product is.
    """
    far: Tensor = (rows[1:] - rows[0]).norm(dim=-1).amax(0) > rows[0].norm(dim=-1) / 2**0.5
    return far


def _few(rows: Tensor) -> int:
    if rows.is_cuda:
        return rows.shape[1]
    return max(1, CACHE_BYTES // (len(rows) * rows.shape[2] * rows.element_size()))


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    """[R, c, V] in pieces [R, few tokens, V] whose elementwise passes stay in the cache."""
    parts: tuple[Tensor, ...] = rows.split(_few(rows), dim=1)
    return parts


def _multiply(rows: Tensor, weight: Tensor, dtype: torch.dtype, out: Tensor) -> Iterator[int]:
    """Multiply rows [M, D] by weight^T, computed in `dtype`, a block of outputs at a time.

    `out` is [M, V] in rows' dtype, or [M, block] that each block overwrites; yields the width of
    the block that was just written.
    """
    exponents = None
    if dtype == torch.float16:  # differences may be below its range
        exponents = torch.frexp(rows.abs().amax(-1, keepdim=True)).exponent
        rows = torch.ldexp(rows, -exponents)
    working = rows.dtype
    rows = rows.to(dtype)
    width = OUTPUTS
    if rows.is_cuda:  # in one go, unless the weights of a block must be cast
        width = out.shape[1] if weight.dtype == dtype else GPU_OUTPUTS
    for start in range(0, len(weight), width):
        block = weight[start : start + width].to(dtype)
        first = start if out.shape[1] == len(weight) else 0
        product = out[:, first : first + len(block)]
        if dtype == working:
            torch.mm(rows, block.t(), out=product)
        elif rows.is_cuda:
            torch.mm(rows, block.t(), out_dtype=working, out=product)
        else:
            product.copy_(torch.mm(rows, block.t()))
        if exponents is not None:
            product.copy_(torch.ldexp(product, exponents))
        yield len(block)


def _compare_deltas(
    rows: Tensor, weight: Tensor, dtype: torch.dtype, pairs: bool, first: int
) -> Tensor:
    """Sum of |rows W^T| differences, [R, R, c] or [R - 1, c]; rows before `first` are zero."""
    R, c, D = rows.shape
    found = rows.new_zeros((R, R, c) if pairs else (R - 1, c), dtype=torch.float64)
    width = min(GPU_OUTPUTS if rows.is_cuda else OUTPUTS, len(weight))
    products = rows.new_zeros(R * c, width)
    wanted = rows[first:].reshape(-1, D)
    for width in _multiply(wanted, weight, dtype, products[first * c :]):
        block = products[:, :width].unflatten(0, (R, c))
        found += torch.cat([metrics.l1(part, pairs) for part in _parts(block)], -1)
    return found


def _compare_logits(
    rows: Tensor,
    far: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    metric: str,
    pairs: bool,
) -> Tensor:
    """Distances of logits: row 0 as it is, the others as differences to it unless `far`."""
    R, c, D = rows.shape
    logits = rows.new_empty(R, c, len(weight))
    for _ in _multiply(rows.reshape(-1, D), weight, dtype, logits.view(R * c, -1)):
        pass
    if metric != "argmax" and metrics.has_kernel(R, logits.device, logits.dtype):
        return metrics.relative(logits, far, bias, metric, pairs)
    moderate = ~far
    if metric == "tv":
        moves = logits[1:]
        low, high = moves.aminmax()  # of all tokens: eight times as fast as token by token
        if not high - low < LARGE:
            moderate &= (moves.amax(2) - moves.amin(2) < LARGE).all(0)
    shift = 0.0 if bias is None else bias.double()
    found = []
    for start in range(0, c, few := _few(logits)):
        part, away = logits[:, start : start + few], far[start : start + few]
        centre = part[0].double() + shift
        if metric == "tv" and part.dtype == torch.float32 and moderate[start : start + few].all():
            found.append(metrics.tv_of_deltas(part, centre.softmax(-1).float(), pairs))
            continue
        f = part.double()
        f[1:] += torch.where(away[:, None], shift, centre)
        f[0] = centre
        found.append(metrics.compare(f, metric, pairs, rows.dtype))
    return torch.cat(found, -1)
