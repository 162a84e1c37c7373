"""The autograd nodes of a group of LoRA linears; the maths is in op.py.

`whole` runs each pass as one C++ call, its node in C++ too. It is for what training mostly is: a
frozen base, and nothing that watches operators. `Stepwise` does the same operator by operator, for
everything else: trained base weights, torch.compile, dispatch modes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adarank_kernels.lora.dropout import draw_seed, is_mask
from adarank_kernels.lora.group import HOST_BOUND, PADDING, Group
from adarank_kernels.runtime.registry import INTERPRETED, waiting_in_use

ALWAYS = 1 << 62  # numbers of outputs up to which C++ adds the low-rank products
# As in F.linear: a reader could not change an output in place (relu_, +=) if it were a view.
_unsafe_view = torch.ops.aten._unsafe_view.default


def rows(tensor: Tensor) -> Tensor:
    """[..., features] -> [N, features], a view wherever one exists."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def in_order(matrix: Tensor) -> Tensor:
    """Rows whose elements lie side by side and that do not overlap: what the C++ operators read."""
    if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]:
        return matrix
    return matrix.contiguous()


def whole(
    group: Group, x: Tensor, seed: Tensor | None, bases: Sequence[Tensor | None] = ()
) -> Sequence[Tensor]:
    """Outputs of all modules, each pass one C++ call; gradients where they are wanted.

    Nothing if the group does not fit the call, which C++ sees faster than Python.
    """
    bound = ALWAYS
    if group.device_type != "cpu":
        bound = HOST_BOUND
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            bound = -1
        if seed is not None and not is_mask(seed):
            return _launched(group, x, seed, bases)
        if (waiting_in_use or INTERPRETED) and not group.dropout and not group.is_few(x):
            if group.backend.backward_kernels(x):
                return _launched(group, x, None, bases)
    if group.compute is None and not group.make_whole(x):
        return ()
    assert group.compute is not None
    outputs = group.compute(x, group.number, seed, bases, group.owned, bound)
    if len(outputs) == len(group.scalings):
        return outputs
    if outputs:
        return _expand(group, x, *outputs)
    if seed is None and group.dropout and group.adapted and group.device_type != "cpu":
        return () if group.is_few(x) else _launched(group, x, draw_seed(x.device), bases)
    return ()


def _launched(
    group: Group, x: Tensor, seed: Tensor | None, bases: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    if bases or group.trains_bias or not group.adapted or not group.fits(x):
        return ()
    if torch.is_grad_enabled():
        return _apply_launched(group, x, seed, *group.inputs)
    return _launched_forward(group, x, seed)[:-2]


def _expand(group: Group, x: Tensor, *products: Tensor) -> Sequence[Tensor]:
    """Base products and S -> outputs: one launch, into what nobody has seen yet."""
    *outputs, S = products
    if group.adapted:
        _, first = group.layout(group.backend, x.dtype)
        adapted = [rows(outputs[m].detach()) for m in group.adapted]
        group.backend.expand(adapted, S, group.lora_Bs, first, group.scalings_of_adapted, True)
    return outputs


class _Context(Protocol):
    """What the nodes use of torch's context, and what they keep there."""

    needs_input_grad: tuple[bool, ...]
    group: Group
    backend: ModuleType
    x_shape: torch.Size
    dtype: torch.dtype
    bases: int
    device_type: str

    @property
    def saved_tensors(self) -> tuple[Any, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_dirty(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def _launched_forward(group: Group, x: Tensor, seed: Tensor | None) -> list[Tensor]:
    """On a GPU: outputs of all modules, then S and A as it was packed."""
    backend = group.backend
    width, first = group.layout(backend, x.dtype)
    S, packed = backend.shrink(rows(x), group.lora_As, first, width, seed, group.dropout)
    add = "lora_expand" not in backend.kernels(x)
    *outputs, S, _ = torch.ops.adarank.group_forward(
        x, group.parts, (), 0, group.scalings, group.dropout, seed, PADDING, add, S
    )
    return [*(outputs if add else _expand(group, x, *outputs, S)), S, packed]


class Launched(torch.autograd.Function):
    """`whole` on a GPU where Triton draws a dropout mask, or computes what C++ does not launch.

    Inputs that may need gradients: x, then A and then B of the modules with a rank.
    """

    @staticmethod
    def forward(
        ctx: _Context, group: Group, x: Tensor, seed: Tensor | None, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        *outputs, S, packed = _launched_forward(group, x, seed)
        _, need_x, _, *needs = ctx.needs_input_grad
        count = len(group.adapted)
        ctx.save_for_backward(
            x if True in needs[:count] else None,
            S if True in needs[count:] else None,
            packed if need_x else None,
            seed,
            *(group.kept if need_x else group.kept_without_weights),
        )
        ctx.group, ctx.x_shape = group, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: _Context, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the result refuses to be differentiated
            return _launched_once(ctx, *dYs)
        return _launched_backward(ctx, *dYs)


def _launched_backward(ctx: _Context, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
    x, S, packed, seed, *parts = ctx.saved_tensors
    group: Group = ctx.group
    needs = ctx.needs_input_grad
    need_x = needs[1]
    need_A = need_B = group.all_needed
    if False in needs[3:]:
        count = len(group.adapted) + 3
        need_A = sum([1 << m for m, n in zip(group.adapted, needs[3:count], strict=True) if n])
        need_B = sum([1 << m for m, n in zip(group.adapted, needs[count:], strict=True) if n])
    dropped = dS = None
    made: list[Tensor | None] = []
    if group.backend.backward_kernels(next(dY for dY in dYs if dY is not None)):
        given = {m: rows(dY) for m in group.adapted if (dY := dYs[m]) is not None}
        dS, _, _, made = _low_rank_gradients(
            group, group.backend, given, parts[2::4], parts[3::4], x, S, seed,
            need_x, need_A, need_B,
        )  # fmt: skip
        need_A = need_B = 0  # C++ is left with dX
    elif x is not None and seed is not None:
        dropped = group.backend.drop(rows(x), seed, group.dropout)
    *found, low = torch.ops.adarank.group_backward(
        dYs, x, S, packed, parts, group.scalings, group.dropout, seed, PADDING, dropped,
        need_x, need_A, need_B, ctx.x_shape, dS,
    )  # fmt: skip
    dX, *grads = found
    grads = made or grads
    if low is not None:
        dX = group.backend.drop_into(low, seed, group.dropout, rows(dX)).view(ctx.x_shape)
    return None, dX, None, *grads


_launched_once = once_differentiable(_launched_backward)
# Without the look for torch.func transforms, which the caller has taken.
_apply_launched = super(torch.autograd.Function, Launched).apply


def _low_rank_gradients(
    group: Group,
    backend: ModuleType,
    dYs: Mapping[int, Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    x: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    need_x: bool,
    need_A: int,
    need_B: int,
) -> tuple[Tensor | None, list[int], Sequence[int], list[Tensor | None]]:
    """(dS, its modules, their first columns, gradients of A and then B of the adapted modules).

    `dYs`: [N, out] of the adapted modules that have one. Bit m of need_A and need_B: module m's.
    """
    grads_A: dict[int, Tensor | None] = dict.fromkeys(group.adapted)
    grads_B: dict[int, Tensor | None] = dict.fromkeys(group.adapted)
    trained = [m for m in dYs if need_B >> m & 1]
    if trained:
        chosen = [dYs[m] for m in trained]
        _, first = group.layout(backend, chosen[0].dtype)
        start_of = dict(zip(group.adapted, first, strict=True))
        starts, ranks = [start_of[m] for m in trained], [group.ranks[m] for m in trained]
        scalings = [group.scalings[m] for m in trained]
        dtypes = [group.dtypes_of_B[m] for m in trained]
        found = backend.grad_B(chosen, S, starts, ranks, scalings, dtypes)
        grads_B.update(zip(trained, found, strict=True))
    through = [m for m in dYs if need_x or need_A >> m & 1]
    dS: Tensor | None = None
    first = ()
    if through:
        chosen = [dYs[m] for m in through]
        width, first = group.layout(backend, chosen[0].dtype, through)
        As, Bs = [lora_As[m] for m in through], [lora_Bs[m] for m in through]
        dS = backend.grad_S(chosen, Bs, [group.scalings[m] for m in through], first, width)
        if any([need_A >> m & 1 for m in through]):
            assert x is not None
            found = backend.grad_A(dS, in_order(rows(x)), As, first, seed, group.dropout)
            for m, dA in zip(through, found, strict=True):
                grads_A[m] = dA if need_A >> m & 1 else None
    return dS, through, first, [*grads_A.values(), *grads_B.values()]


class Stepwise(torch.autograd.Function):
    """Tensors: weight, bias, A and B of each module, then foreign base products; None: absent."""

    @staticmethod
    def forward(
        ctx: _Context,
        group: Group,
        backend: ModuleType,
        in_place: bool,
        x: Tensor,
        seed: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        M = len(group.scalings)
        parts, bases = tensors[: 4 * M], tensors[4 * M :]
        X = rows(x)
        S = packed = None
        adapted = group.adapted
        width, first = group.layout(backend, x.dtype)
        As: list[Tensor | None] = [parts[4 * m + 2] for m in adapted]
        Bs: list[Tensor | None] = [parts[4 * m + 3] for m in adapted]
        if adapted:
            X = in_order(X)
            S, packed = backend.shrink(X, As, first, width, seed, group.dropout)
        products: list[Tensor] = []
        dirty: list[Tensor] = []
        for m in range(M):
            base = bases[m] if bases else None
            if base is None:
                products.append(F.linear(X, parts[4 * m], parts[4 * m + 1]))  # type: ignore[arg-type]
            elif in_place and m in adapted and group.may_overwrite(m, base):
                dirty.append(base)
                products.append(base if base.dim() == 2 else base.view(-1, base.shape[-1]))
            else:
                products.append(rows(base).clone(memory_format=torch.contiguous_format))
        if S is not None:
            sums = backend.expand(
                [products[m] for m in adapted], S, Bs, first, group.scalings_of_adapted, in_place
            )
            for m, Y in zip(adapted, sums, strict=True):
                products[m] = Y
        outputs = []
        for m, Y in enumerate(products):
            base = bases[m] if bases else None
            if base is not None and any([base is other for other in dirty]):
                outputs.append(base)
            elif x.dim() == 2:
                outputs.append(Y)
            else:
                outputs.append(_unsafe_view(Y, [*x.shape[:-1], Y.shape[-1]]))
        if dirty:
            ctx.mark_dirty(*dirty)
        need_x, _, *needs = ctx.needs_input_grad[3:]
        need_W, need_A, need_B = needs[0 : 4 * M : 4], needs[2 : 4 * M : 4], needs[3 : 4 * M : 4]
        absent = (None,) * M
        ctx.save_for_backward(
            x if any(need_W) or any(need_A) else None,
            S if any(need_B) else None,
            packed if need_x else None,
            seed,
            *(parts[0::4] if need_x else absent),
            *(parts[2::4] if need_x or any(need_A) else absent),
            *(parts[3::4] if need_x or any(need_A) else absent),
        )
        ctx.group, ctx.backend, ctx.x_shape, ctx.dtype = group, backend, x.shape, x.dtype
        ctx.bases, ctx.device_type = len(bases), x.device.type
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(ctx.device_type):
            return _stepwise_backward(ctx, dYs)
        with torch.autocast(ctx.device_type, enabled=False):  # the forward's dtypes hold
            return _stepwise_backward(ctx, dYs)


def _stepwise_backward(ctx: _Context, dYs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    group: Group = ctx.group
    backend = ctx.backend
    M = len(group.scalings)
    x, S, packed, seed, *saved = ctx.saved_tensors
    weights, lora_As, lora_Bs = saved[:M], saved[M : 2 * M], saved[2 * M :]
    need_x, _, *needs = ctx.needs_input_grad[3:]
    grads: list[Tensor | None] = [None] * len(needs)
    dX: Tensor | None = None
    adapted: dict[int, Tensor] = {}
    X = None if x is None else rows(x)
    for m, dY in enumerate(dYs):
        if dY is None:
            continue
        dY2 = rows(dY)
        if ctx.bases and needs[4 * M + m]:
            grads[4 * M + m] = dY
        if needs[4 * m]:
            grads[4 * m] = torch.mm(dY2.t(), X)  # type: ignore[arg-type]
        if needs[4 * m + 1]:
            grads[4 * m + 1] = dY2.sum(0)
        if need_x and weights[m] is not None:
            product = torch.mm(dY2, weights[m])
            dX = product if dX is None else dX + product
        if m in group.adapted:
            adapted[m] = in_order(dY2 if dY2.dtype == ctx.dtype else dY2.to(ctx.dtype))
    need_A = sum([1 << m for m in group.adapted if needs[4 * m + 2]])
    need_B = sum([1 << m for m in group.adapted if needs[4 * m + 3]])
    dS, through, first, found = _low_rank_gradients(
        group, backend, adapted, lora_As, lora_Bs, x, S, seed, need_x, need_A, need_B
    )
    if need_x and dS is not None:
        As = [lora_As[m] for m in through]
        packed = packed if len(through) == len(group.adapted) else None
        dX = backend.grad_X(dX, dS, As, first, packed, seed, group.dropout)
    count = len(group.adapted)
    for m, dA, dB in zip(group.adapted, found[:count], found[count:], strict=True):
        grads[4 * m + 2], grads[4 * m + 3] = dA, dB
    if dX is not None:
        dX = dX.view(ctx.x_shape)
    return None, None, None, dX, None, *grads
