"""What CUDA graphs of one memory pool do to their tensors, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adarank_fast.adapters.graph_backends import Outputs


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
            outputs = run()
            again = run()
        number = self.captures
        self.captures += 1
        self._outputs.append(
            [
                output
                for output, other in zip(outputs, again, strict=True)
                if output is not None and output.data_ptr() != other.data_ptr()
            ]
        )
        self._spoil(number)

        def replay() -> None:
            self.replays += 1
            self._spoil(number + 1)
            for output, new in zip(outputs, run(), strict=True):
                if output is not None and output.data_ptr() != new.data_ptr():
                    with torch.no_grad():
                        output.copy_(new)

        return outputs, replay

    def _spoil(self, first: int) -> None:
        with torch.no_grad():
            for output in [t for outputs in self._outputs[first:] for t in outputs]:
                output.fill_(float("nan") if output.is_floating_point() else 0)
