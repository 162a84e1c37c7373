"""What CUDA graphs of one memory pool do to their tensors, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from adarank_fast.adapters.graph_backends import Outputs

aten = torch.ops.aten
READS_ON_THE_HOST = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten.equal.default, aten.is_nonzero.default,
}  # fmt: skip


class StandIn:
    """Runs the computation again at each replay and writes over what the capture returned.

    - A capture computes nothing that may be used: its outputs are filled with NaN, and torch's
      generator is left as it was.
    - What a graph freed may be where a later one keeps its outputs: a replay fills the outputs of
      all later captures with NaN.

    Attributes:
        captures, replays: how many there were.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self._outputs: list[list[Tensor]] = []  # of each capture, without inputs handed through

    def capture(self, run: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        with torch.random.fork_rng(devices=[]):
            outputs, again, made = self._record(run)
        number = self.captures
        self.captures += 1
        self._outputs.append(made)
        self._spoil(number)

        def replay() -> None:
            self.replays += 1
            self._spoil(number + 1)
            again()

        return outputs, replay

    def _record(
        self, run: Callable[[], Outputs]
    ) -> tuple[Outputs, Callable[[], None], list[Tensor]]:
        """Outputs, what computes them into the same tensors, and which of them are its own."""
        outputs = run()
        made = [
            output.data_ptr() != other.data_ptr()
            for output, other in zip(outputs, run(), strict=True)
        ]

        def again() -> None:
            for output, new in zip(outputs, run(), strict=True):
                if output.data_ptr() != new.data_ptr():
                    with torch.no_grad():
                        output.copy_(new)

        return outputs, again, [o for o, own in zip(outputs, made, strict=True) if own]

    def _spoil(self, first: int) -> None:
        with torch.no_grad():
            for output in [t for outputs in self._outputs[first:] for t in outputs]:
                output.fill_(float("nan") if output.is_floating_point() else 0)


class Tape(StandIn):
    """Repeats the operators that the capture ran, on the same tensors, and none of its Python.

    So whatever Python decided stays as it was at the capture, as in a CUDA graph, and a value that
    is read on the host breaks the capture. Fused layers see that operators are watched, and take
    the way that is for this.
    """

    def _record(
        self, run: Callable[[], Outputs]
    ) -> tuple[Outputs, Callable[[], None], list[Tensor]]:
        with _Recording() as tape:
            outputs = run()
        return outputs, tape.again, [o for o in outputs if _storage(o) in tape.made]


class _Recording(TorchDispatchMode):
    """The operators that run meanwhile, but for views."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []
        self.made: set[int] = set()  # storages
        self.kept: list[Tensor] = []  # so that no storage is used anew

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if func in READS_ON_THE_HOST and given & self.made:  # not so a constant of the host
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        output = func(*args, **kwargs)
        # the same memory, without the nodes of autograd that the tensors get or have
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        tensors = [t.detach() for t in tree_leaves(output) if isinstance(t, Tensor)]
        own = [t if _storage(t) not in given else None for t in tensors]
        self.made |= {_storage(t) for t in own if t is not None}
        self.kept += tensors
        if any(t is not None for t in own) or func._schema.is_mutable:
            self.calls.append((func, args, kwargs, own))
        return output

    def again(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, outputs in self.calls:
                found = func(*args, **kwargs)
                new = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
                for output, tensor in zip(outputs, new, strict=True):
                    if output is not None:
                        output.copy_(tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
