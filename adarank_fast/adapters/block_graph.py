"""One block's forward and backward as two graphs, and their place in autograd.

Graphs share a pool of memory: what one gave back, a later one keeps its tensors in. Forwards and
backwards are captured in the order of a step's blocks, while everything that an earlier forward
keeps for its backward is held; then no graph overwrites what another one under way still needs, as
long as forwards run in the order of their capture and backwards in the reverse of it, and as long
as graphs of two sessions never run together. `Flights` sees to that. What the pool may overwrite
later is copied where it leaves: gradients always, outputs where the caller may keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from adarank_fast.adapters.graph_backends import Backend
from adarank_fast.adapters.graph_calls import Static, UnfitError, put_together, taken_apart
from adarank_fast.errors import AdarankRuntimeError


class Session:
    """Graphs that may be under way together: one bucket of shapes, captured in one step.

    Attributes:
        graphs: in the order of their capture; what their forwards keep is held until `end`.
        sealed: a backward pass has begun, so nothing more is captured in it.
        statics: of inputs, which several blocks may share.
        arriving: of outputs' gradients, which each backward reads at once.
    """

    def __init__(self) -> None:
        self.graphs: list[BlockGraph] = []
        self.statics: list[Static] = []
        self.arriving: dict[Hashable, Tensor] = {}
        self.sealed = False

    def end(self) -> None:
        """Let later captures use the memory of what the forwards keep."""
        self.sealed = True
        for graph in self.graphs:
            graph.release()


class Flights:
    """Forwards that were replayed and whose backward may still come, in their order."""

    def __init__(self) -> None:
        self.under_way: dict[int, BlockGraph] = {}  # ticket -> graph
        self.tickets = 0

    def may_begin(self, graph: BlockGraph, tensors: Sequence[Tensor]) -> bool:
        """Whether its memory is free, and all that is under way was captured before it."""
        if not self.under_way:
            return True
        last = self.under_way[next(reversed(self.under_way))]
        if last.session is not graph.session or last.position >= graph.position:
            return False
        written = [
            static.buffer.data_ptr()
            for static, tensor in zip(graph.statics, tensors, strict=True)
            if not static.has(tensor)
        ]
        return not written or not any(
            [address in other.addresses for other in self.under_way.values() for address in written]
        )


class Ticket:
    """One forward that is under way, for as long as its autograd graph lives."""

    def __init__(self, flights: Flights, graph: BlockGraph) -> None:
        flights.tickets += 1
        self.flights, self.number = flights, flights.tickets
        flights.under_way[self.number] = graph

    def land(self) -> None:
        """Its backward runs: what came after it and is still under way has lost its memory."""
        under_way = self.flights.under_way
        if self.number not in under_way:
            raise AdarankRuntimeError(
                "a second backward pass through a graphed block, or one in another order than the "
                "forwards; call adarank_fast.restore(model) for losses that need it"
            )
        for number in [number for number in under_way if number >= self.number]:
            del under_way[number]

    def __del__(self) -> None:
        self.flights.under_way.pop(self.number, None)


class BlockGraph:
    """A block's forward and backward for one kind of call.

    Args:
        forward: of the block, with its arguments by name.
        template: the arguments, from `taken_apart`.
        statics: of its tensors, in their order.
        needs_grad: which of these require a gradient.
        chained: which of these are another graph's output: their gradients go nowhere else.
        parameters: that require one.
        keeps: whether the forward keeps what the backward needs; otherwise it is computed again.
    """

    def __init__(
        self,
        backend: Backend,
        session: Session,
        flights: Flights,
        forward: Callable[..., object],
        template: dict[str, object],
        statics: Sequence[Static],
        needs_grad: Sequence[bool],
        chained: Sequence[bool],
        parameters: Sequence[nn.Parameter],
        keeps: bool,
        autocast: tuple[str, torch.dtype] | None,
    ) -> None:
        self.session, self.flights = session, flights
        self._block, self._arguments, self.statics = forward, template, list(statics)
        self._needs_grad, self._chained = list(needs_grad), list(chained)
        self.parameters = list(parameters)
        self._keeps, self._autocast = keeps, autocast
        self._leaves: list[Tensor] = []
        self._live: list[Tensor] = []
        self.output_template: object = None
        with nullcontext() if keeps else _unwatched():
            self.outputs, self.replay_forward = backend.capture(self._forward)
            self._prepare_backward()
            self._gradients, self.replay_backward = backend.capture(self._backward)
        held = [*self.outputs, *[static.buffer for static in self.statics]]
        self.addresses = {tensor.data_ptr() for tensor in held}
        self.position = len(session.graphs)
        session.graphs.append(self)

    def release(self) -> None:
        """Hold what the captured forward keeps no longer."""
        self._live, self._leaves = [], []

    def close(self) -> None:
        """Free all of it: autograd's nodes, too, know the shapes that parameters had."""
        self.release()
        self.replay_forward = self.replay_backward = _closed

    def _compute(self) -> list[Tensor]:
        """Outputs, from new leaves on the static inputs."""
        self._leaves = [
            static.buffer.detach().requires_grad_(needs and torch.is_grad_enabled())
            for static, needs in zip(self.statics, self._needs_grad, strict=True)
        ]
        with ExitStack() as stack:
            if self._autocast is not None:  # what its cache holds would not be made again
                kind, dtype = self._autocast
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            arguments = put_together(self._arguments, iter(self._leaves))
            output = self._block(**cast("dict[str, object]", arguments))
        outputs: list[Tensor] = []
        self.output_template, _ = taken_apart(output, outputs)
        return outputs

    def _forward(self) -> list[Tensor]:
        with torch.set_grad_enabled(self._keeps):
            self._live = self._compute()
        return [output.detach() for output in self._live]

    def _prepare_backward(self) -> None:
        """Buffers outside the pool: what arrives, and the inputs' gradients, which may wait."""
        if self._keeps:
            self.differentiable = [output.requires_grad for output in self._live]
        else:  # which of them depend on something that is trained is not known yet
            self.differentiable = [output.is_floating_point() for output in self._live]
        self.arriving: list[Tensor | None] = []
        for place, output in enumerate(self.outputs):
            key = place, output.shape, output.stride(), output.dtype
            if self.differentiable[place]:
                buffers = self.session.arriving
                self.arriving.append(buffers.setdefault(key, torch.zeros_like(output)))
            else:
                self.arriving.append(None)
        self.leaving = [
            torch.zeros_like(static.buffer) if needs else None
            for static, needs in zip(self.statics, self._needs_grad, strict=True)
        ]

    def _backward(self) -> list[Tensor]:
        """The parameters' gradients, end to end, one tensor for each dtype."""
        with torch.enable_grad():
            outputs = self._live if self._keeps else self._compute()
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, self.arriving, strict=True)
            if grad is not None and output.requires_grad
        ]
        if not pairs:
            raise UnfitError("nothing in it is trained")
        inputs = [
            leaf
            for leaf, buffer in zip(self._leaves, self.leaving, strict=True)
            if buffer is not None
        ]
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            [*inputs, *self.parameters],
            [grad for _, grad in pairs],
            allow_unused=True,
            retain_graph=self._keeps,
        )
        arrived = iter(found)
        for i, buffer in enumerate(self.leaving):
            grad = None if buffer is None else next(arrived)
            if buffer is not None and grad is not None:
                with torch.no_grad():
                    buffer.copy_(grad)
            else:
                self.leaving[i] = None
        grads = found[len(inputs) :]
        self.used = [grad is not None for grad in grads]
        parts: dict[torch.dtype, list[Tensor]] = {}
        for grad in grads:
            if grad is not None:
                parts.setdefault(grad.dtype, []).append(grad.reshape(-1))
        return [torch.cat(each) for each in parts.values()]

    def call(self, tensors: Sequence[Tensor], clone: bool) -> object:
        """The block's output; `clone`: the caller may keep it."""
        results = _Replay.apply(self, clone, *tensors, *self.parameters)  # type: ignore[no-untyped-call]
        return put_together(self.output_template, iter(results))

    def input_gradients(self) -> list[Tensor | None]:
        """Copies, but for what the graph before this one reads at once."""
        return [
            None if buffer is None else buffer.detach() if chained else buffer.clone()
            for buffer, chained in zip(self.leaving, self._chained, strict=True)
        ]

    def parameter_gradients(self) -> list[Tensor | None]:
        """Views of a copy: the next replay must not write into a parameter's `.grad`."""
        flat = {part.dtype: part.clone() for part in self._gradients}
        begun = dict.fromkeys(flat, 0)
        found: list[Tensor | None] = []
        for parameter, used in zip(self.parameters, self.used, strict=True):
            if not used:
                found.append(None)
                continue
            dtype, size = parameter.dtype, parameter.numel()
            first = begun[dtype]
            begun[dtype] = first + size
            found.append(flat[dtype][first : first + size].view(parameter.shape))
        return found


class _Context(Protocol):
    """What a replay uses of torch's context, and what it keeps there."""

    graph: BlockGraph
    ticket: Ticket

    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


class _Replay(torch.autograd.Function):
    """A replay of the forward; its backward is one of the backward."""

    @staticmethod
    def forward(
        ctx: _Context, graph: BlockGraph, clone: bool, *given: Tensor
    ) -> tuple[Tensor, ...]:
        for static, tensor in zip(graph.statics, given, strict=False):
            static.fill(tensor)
        ctx.graph, ctx.ticket = graph, Ticket(graph.flights, graph)
        graph.replay_forward()
        found = [output.clone() if clone else output.detach() for output in graph.outputs]
        pairs = zip(found, graph.differentiable, strict=True)
        ctx.mark_non_differentiable(*[output for output, wanted in pairs if not wanted])
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        graph = ctx.graph
        ctx.ticket.land()
        graph.session.sealed = True
        for buffer, grad in zip(graph.arriving, grads, strict=True):
            if buffer is not None and grad is None:
                buffer.zero_()
            elif buffer is not None and grad is not None:
                buffer.copy_(grad)
        graph.replay_backward()
        return None, None, *graph.input_gradients(), *graph.parameter_gradients()


def _closed() -> None:
    raise AdarankRuntimeError("the graphs of this forward were freed before its backward pass")


@contextmanager
def _unwatched() -> Iterator[None]:
    """Hooks for saved tensors, checkpointing's among them, do not see what is captured."""

    def same(tensor: Tensor) -> Tensor:
        return tensor

    with saved_tensors_hooks(same, same):
        yield
