"""CUDA graphs of a model's blocks: a step of small kernels no longer waits for Python.

Each block's forward and backward are captured once for every shape of its input, and replayed in
later steps. Everything else (embeddings, head, loss, optimiser) runs as before, and so does a block
in every call that its graphs do not cover; such calls are counted, with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from adarank_fast.adapters.graph_backends import Backend, CudaGraphs
from adarank_fast.adapters.graphs import (
    FIRST_CALLS,
    NEW_SHAPE,
    TOO_MANY,
    WARM_UP,
    Graphs,
    Place,
    Shape,
)
from adarank_fast.adapters.swapped import Swapped, put_back
from adarank_fast.adapters.terms import is_plain
from adarank_fast.adapters.torch_private import is_compiled
from adarank_fast.errors import AdarankError
from adarank_fast.json_values import said
from adarank_fast.models.targets import find_blocks, unwrap
from adarank_fast.models.transformers_private import is_moved_by_hooks
from adarank_fast.undo import undone_on_error

WRAPPERS = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")


class _GraphedBlock(Swapped):
    """Mixed in before a block's class."""

    HIDDEN = "_adarank_graphs"
    PLAIN: ClassVar[dict[type, type]] = {}
    _adarank_graphs: Place

    def forward(self, *args: object, **kwargs: object) -> object:
        if torch.compiler.is_compiling():
            return self.plain_forward(*args, **kwargs)
        place = self._adarank_graphs
        return place.graphs.call(self, place, args, kwargs)

    def plain_forward(self, *args: object, **kwargs: object) -> object:
        """The block's own forward."""
        return super().forward(*args, **kwargs)  # type: ignore[misc]


@dataclass(frozen=True)
class GraphReport:
    """What `graph_blocks` did so far; prints as a summary.

    Attributes:
        blocks: of the model.
        graphed_calls, eager_calls: of blocks, since `graph_blocks`.
        reasons: why calls ran eagerly -> how many.
        shapes: (batch, length) -> how many blocks are captured for it.
    """

    blocks: int
    graphed_calls: int
    eager_calls: int
    reasons: dict[str, int]
    shapes: dict[Shape, int]

    def __str__(self) -> str:
        calls = self.graphed_calls + self.eager_calls
        share = f"{self.graphed_calls / calls:.1%} of calls graphed" if calls else "no forward yet"
        shapes = ", ".join(" x ".join(map(str, shape)) for shape in self.shapes) or "none yet"
        lines = [f"{self.blocks} blocks, {share}; shapes: {shapes}"]
        lines += [f"  {count} eager calls: {why}" for why, count in self.reasons.items()]
        never_again = self.reasons.get(FIRST_CALLS, 0) > 4 * WARM_UP * self.blocks
        if never_again or self.reasons.keys() & {NEW_SHAPE, TOO_MANY}:
            lines.append(
                "  pad batches to few lengths: pad_to_multiple_of of the collator, or "
                "adarank_fast.BucketCollator; and drop or fill the last batch"
            )
        return "\n".join(lines)


def graph_blocks(peft_model: nn.Module, shapes: Iterable[Shape] | None = None) -> nn.Module:
    """Capture each block's forward and backward as CUDA graphs, in place; only DDP comes after it.

    A call of a block is replayed if its shapes, its other arguments and the model's state are those
    of a captured one; a kind of call is captured when it comes for the third time. Gradients are as
    without graphs. Pad batches to few lengths: each shape holds its own inputs and outputs.

    Args:
        peft_model: from `inject`, `accelerate` or PEFT, on one CUDA device.
        shapes: (batch, length) of the inputs that may be captured; None: the first eight.

    Returns:
        `peft_model`. `restore` undoes it.

    Raises:
        AdarankError: there is no CUDA device, no blocks (elements of a ModuleList), a shape is not
            of positive integers, or the model is compiled, sharded, wrapped or offloaded.
    """
    wanted = _checked(shapes)
    _check_model(peft_model)
    devices = {p.device for p in peft_model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        where = ", ".join(sorted(map(str, devices))) or "no device"
        raise AdarankError(f"CUDA graphs need the model on one CUDA device; it is on {where}")
    return graph_with(peft_model, CudaGraphs(next(iter(devices))), wanted)


def graph_with(
    peft_model: nn.Module,
    backend: Backend,
    shapes: frozenset[Shape] | None = None,
    paths: Sequence[str] | None = None,
) -> nn.Module:
    """The same with another backend, wherever the model is; `paths`: of other modules as blocks."""
    _check_model(peft_model)
    inner = unwrap(peft_model)
    paths = find_blocks(inner) if paths is None else paths
    if not paths:
        raise AdarankError(f"{type(inner).__name__} has no ModuleList of blocks to capture")
    graphs = Graphs(backend, shapes, getattr(inner, "config", None))
    last = {path.rpartition(".")[0]: path for path in paths}
    with undone_on_error(put_back(peft_model)):
        restore_blocks(peft_model)
        for position, path in enumerate(paths):
            block = inner.get_submodule(path)
            plain = type(block)
            swapped = next((cls for cls, old in _GraphedBlock.PLAIN.items() if old is plain), None)
            if swapped is None:
                swapped = type(plain.__name__, (_GraphedBlock, plain), {"__module__": __name__})
                _GraphedBlock.PLAIN[swapped] = plain
            names = _argument_names(plain.plain_class() if issubclass(plain, Swapped) else plain)
            is_last = last[path.rpartition(".")[0]] == path
            block.__dict__["_adarank_graphs"] = Place(graphs, position, names, is_last)
            block.__class__ = swapped
    return peft_model


def restore_blocks(model: nn.Module) -> None:
    """Their own classes again; the graphs are freed."""
    for block in _blocks(model):
        block.__class__ = _GraphedBlock.PLAIN[type(block)]
        block.__dict__.pop("_adarank_graphs", None)


def graph_report(peft_model: nn.Module) -> GraphReport:
    """How many calls of blocks were replayed, and why others were not.

    Raises:
        AdarankError: `graph_blocks` was not called.
    """
    blocks = list(_blocks(peft_model))
    if not blocks:
        raise AdarankError("nothing is captured: call adarank_fast.graph_blocks(peft_model) first")
    graphs: Graphs = blocks[0]._adarank_graphs.graphs
    return GraphReport(
        blocks=len(blocks),
        graphed_calls=graphs.graphed,
        eager_calls=graphs.eager.total(),
        reasons=dict(graphs.eager.most_common()),
        shapes=dict(graphs.captured_shapes),
    )


def _blocks(model: nn.Module) -> Iterator[_GraphedBlock]:
    return (m for m in list(model.modules()) if isinstance(m, _GraphedBlock))


def _argument_names(block_class: type[nn.Module]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(block_class.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds][1:]


def _checked(shapes: Iterable[Shape] | None) -> frozenset[Shape] | None:
    if shapes is None:
        return None
    given = [tuple(shape) if isinstance(shape, (tuple, list)) else shape for shape in shapes]
    for shape in given:
        if not isinstance(shape, tuple) or not all(
            type(size) is int and size > 0 for size in shape
        ):
            raise AdarankError(
                f"shapes has {said(shape)}; give pairs of batch and length, such as (8, 2048)"
            )
    if not given:
        raise AdarankError("shapes is empty; give pairs such as (8, 2048), or None")
    return frozenset(given)


def _check_model(model: nn.Module) -> None:
    """Refuse what graphs do not survive, or what was done in the wrong order."""
    for path, module in model.named_modules():
        where, kind = path or type(model).__name__, type(module)
        if is_compiled(module):
            raise AdarankError(f"{where} is compiled; use graph_blocks or torch.compile, not both")
        if kind.__name__ in WRAPPERS:
            raise AdarankError(f"{where} is a {kind.__name__}; graph_blocks first, then wrap")
        if any("FSDP" in c.__name__ or "FullySharded" in c.__name__ for c in kind.__mro__):
            raise AdarankError(f"{where} is sharded by FSDP, which moves parameters between calls")
        if is_moved_by_hooks(module):
            raise AdarankError(f"{where} is offloaded or spread over devices by hooks")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise AdarankError(f"{name} is partitioned by DeepSpeed ZeRO-3, which moves parameters")
        if hasattr(parameter, "device_mesh") and not is_plain(parameter):
            raise AdarankError(f"{name} is a sharded tensor; graph_blocks needs whole parameters")
