"""Which graph a block's call is served by, when one is captured, and why a call runs eagerly."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adarank_fast.adapters.block_graph import BlockGraph, Flights, Session
from adarank_fast.adapters.graph_backends import Backend
from adarank_fast.adapters.graph_calls import (
    Foundation,
    Static,
    UnfitError,
    by_name,
    taken_apart,
)
from adarank_fast.adapters.groups import may_be_repeated
from adarank_fast.adapters.torch_private import in_backward
from adarank_fast.models.text import first_line

WARM_UP = 2  # eager calls of a kind before its capture: groups are found, kernels compiled
MOST_SHAPES = 8  # without `shapes`: each holds its own inputs and outputs
MOST_KINDS = 4096  # of calls that came, over all blocks
MOST_CHANGES = 8  # of parameters, after which nothing more is captured
Shape = tuple[int, ...]
NEW_SHAPE = "a shape that was not captured"
TOO_MANY = f"more than {MOST_SHAPES} shapes"
FIRST_CALLS = "the first calls, before the capture"


class Block(Protocol):
    """What the graphs use of a block."""

    def plain_forward(self, *args: object, **kwargs: object) -> object:
        """The block's own forward."""


class Place:
    """A block's place among the graphs of its model.

    Args:
        graphs: of its model.
        position: among the model's blocks.
        names: of its forward's arguments.
        last: of its list, so that the caller may keep its output.
    """

    def __init__(self, graphs: Graphs, position: int, names: list[str], last: bool) -> None:
        self.graphs, self.position, self.names, self.last = graphs, position, names, last


class Kind:
    """Calls of one block that one pair of graphs serves."""

    def __init__(self) -> None:
        self.calls = 0
        self.graph: BlockGraph | None = None
        self.failed = ""
        self.draws = False  # random numbers


class Graphs:
    """The graphs of a model: their sessions, what is under way, and what was counted."""

    def __init__(
        self, backend: Backend, shapes: frozenset[Shape] | None, config: object = None
    ) -> None:
        self.backend, self.shapes, self.config = backend, shapes, config
        self.flights, self.session = Flights(), Session()
        self.kinds: dict[tuple[int, Hashable], Kind] = {}  # block's position, call
        self.foundations: dict[int, Foundation] = {}
        self.captured_shapes: Counter[Shape] = Counter()
        self.changes = 0  # after which all was captured anew
        self.stale = False  # a block has changed, others are under way
        self.graphed = 0
        self.eager: Counter[str] = Counter()
        self.thread: int | None = None  # of the first call

    def __deepcopy__(self, memo: dict[int, object]) -> Graphs:
        new = Graphs(self.backend, self.shapes, copy.deepcopy(self.config, memo))
        memo[id(self)] = new
        return new

    def forget(self) -> None:
        """Drop all graphs, since what they depend on has changed; no replay may be under way."""
        for kind in self.kinds.values():
            if kind.graph is not None:
                kind.graph.close()
        self.session = Session()
        self.kinds.clear()
        self.foundations.clear()
        self.captured_shapes.clear()
        self.changes, self.stale = self.changes + 1, False

    def call(
        self, block: Any, place: Place, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        """The block's output, from its graphs or its own forward."""
        kind = None
        try:
            _check_modes(block)
            if in_backward():  # autograd's nodes would know shapes that parameters had before
                self._forget_if_changed(place.position)
                raise UnfitError("called inside a backward pass (reentrant checkpointing)")
            if self.thread is None:
                self.thread = threading.get_ident()
            if self.thread != threading.get_ident():
                raise UnfitError("another thread")
            arguments = by_name(place.names, args, kwargs)
            tensors: list[Tensor] = []
            template, key = taken_apart(arguments, tensors)
            if not tensors:
                raise UnfitError("no tensor among its arguments")
            first = args[0] if args else kwargs.get("hidden_states")
            shape = self._shape(first if isinstance(first, Tensor) else tensors[0])
            foundation = self._foundation(place.position, block)
            device = tensors[0].device.type
            autocast = None
            if torch.is_autocast_enabled(device):
                autocast = device, torch.get_autocast_dtype(device)
            keeps = not may_be_repeated()
            if not keeps and not (block.training and getattr(block, "gradient_checkpointing", 0)):
                raise UnfitError("hooks for saved tensors, not of this block's checkpointing alone")
            whole = key, foundation.flags(), autocast, keeps
            kind = self._kind(place.position, whole)
            if kind.graph is None:
                self._check_ready(kind, keeps)
                kind.graph = self._capture(
                    block, foundation, template, tensors, keeps, autocast, kind
                )
                self.captured_shapes[shape] += 1
            if not self.flights.may_begin(kind.graph, tensors):
                raise UnfitError("an earlier forward still waits for its backward pass")
        except UnfitError as reason:
            return self._eager(block, args, kwargs, str(reason), kind)
        self.graphed += 1
        return kind.graph.call(tensors, clone=place.last or self._is_kept(block))

    def _kind(self, position: int, key: Hashable) -> Kind:
        if len(self.kinds) >= MOST_KINDS:  # shapes that never repeat
            self.kinds = {key: kind for key, kind in self.kinds.items() if kind.graph is not None}
        return self.kinds.setdefault((position, key), Kind())

    def _is_kept(self, block: nn.Module) -> bool:
        """Whether the caller may keep the output of a block that is not the last."""
        return bool(block._forward_hooks) or getattr(self.config, "output_hidden_states", False)

    def _eager(
        self,
        block: Block,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        reason: str,
        kind: Kind | None,
    ) -> object:
        self.eager[reason] += 1
        if kind is None or kind.calls > WARM_UP:
            return block.plain_forward(*args, **kwargs)
        device = next((t.device for t in [*args, *kwargs.values()] if isinstance(t, Tensor)), None)
        before = _random_state(device)
        output = block.plain_forward(*args, **kwargs)
        after = _random_state(device)
        kind.draws |= before is not None and after is not None and not torch.equal(before, after)
        return output

    def _shape(self, x: Tensor) -> Shape:
        """Batch and length of the block's input; refused if it may not be captured."""
        shape = tuple(x.shape[:-1])
        if self.shapes is not None and shape not in self.shapes:
            raise UnfitError(NEW_SHAPE)
        if self.shapes is None and shape not in self.captured_shapes:
            if len(self.captured_shapes) >= MOST_SHAPES:
                raise UnfitError(TOO_MANY)
        return shape

    def _forget_if_changed(self, position: int) -> None:
        """Free the graphs if a block is not what they were captured from.

        While other blocks' forwards are under way, the block's own at once: autograd's nodes in
        them know the shapes that its parameters had. The rest follows before the next step.
        """
        foundation = self.foundations.get(position)
        why = foundation.why_not() if foundation is not None else ""
        if self.flights.under_way and why:
            self.stale = self.session.sealed = True
            for (where, _), kind in self.kinds.items():
                if where == position and kind.graph is not None:
                    kind.graph.release()
            raise UnfitError(why)
        if not self.flights.under_way and (why or self.stale):
            self.forget()

    def _foundation(self, position: int, block: nn.Module) -> Foundation:
        self._forget_if_changed(position)
        foundation = self.foundations.get(position)
        if foundation is None:
            foundation = self.foundations[position] = Foundation(block)
        if foundation.has_hooks():
            raise UnfitError("hooks inside of the block")
        return foundation

    def _check_ready(self, kind: Kind, keeps: bool) -> None:
        """Whether the capture may take place now."""
        kind.calls += 1
        if kind.failed:
            raise UnfitError(kind.failed)
        if self.changes > MOST_CHANGES:
            raise UnfitError("parameters or modules change again and again")
        if kind.calls <= WARM_UP:
            raise UnfitError(FIRST_CALLS)
        if kind.draws and not keeps:
            raise UnfitError("dropout under checkpointing, whose masks would be drawn anew")
        if self.flights.under_way and self.session.sealed:
            raise UnfitError("the blocks before it were captured without it")

    def _capture(
        self,
        block: Block,
        foundation: Foundation,
        template: Any,
        tensors: Sequence[Tensor],
        keeps: bool,
        autocast: tuple[str, torch.dtype] | None,
        kind: Kind,
    ) -> BlockGraph:
        if not self.flights.under_way:
            self._begin_session()
        if why := foundation.changes():
            raise UnfitError(why)
        try:
            with torch.no_grad():
                found = [self._static(tensor) for tensor in tensors]
                for (static, _), tensor in zip(found, tensors, strict=True):
                    static.fill(tensor)
            return BlockGraph(
                self.backend, self.session, self.flights, block.plain_forward, template,
                [static for static, _ in found], [tensor.requires_grad for tensor in tensors],
                [of_a_graph for _, of_a_graph in found], foundation.parameters, keeps, autocast,
            )  # fmt: skip
        except UnfitError as reason:
            kind.failed = str(reason)
            raise
        except torch.OutOfMemoryError:
            kind.failed = "too little memory for its graphs"
        except Exception as error:  # a value read on the host, an operator that cannot be captured
            kind.failed = f"the capture failed: {first_line(error)[:120]}"
        raise UnfitError(kind.failed)

    def _begin_session(self) -> None:
        """A step's first capture; goes on with what this step has captured so far."""
        if self.session.sealed or not self.session.graphs:
            self.session.end()
            self.session = Session()

    def _static(self, tensor: Tensor) -> tuple[Static, bool]:
        """A buffer for an input, and whether it is another graph's output."""
        for graph in reversed(self.session.graphs):
            for output in graph.outputs:
                same = (output.shape, output.stride()) == (tensor.shape, tensor.stride())
                if same and output.data_ptr() == tensor.data_ptr():
                    return Static(output), True
        for static in self.session.statics:
            same = static.buffer.shape == tensor.shape and static.buffer.dtype == tensor.dtype
            if same and static.holds(tensor):
                return static, False
        static = Static.like(tensor)
        self.session.statics.append(static)
        return static, False


def _check_modes(block: nn.Module) -> None:
    if not torch.is_grad_enabled():
        raise UnfitError("no gradients: evaluation or generation")
    if "_is_replica" in block.__dict__:
        raise UnfitError("a replica of DataParallel")


def _random_state(device: torch.device | None) -> Tensor | None:
    if device is None or device.type not in ("cpu", "cuda"):
        return None
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
