"""What records a computation once and repeats it: CUDA graphs behind a small interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from adarank_fast.adapters.torch_private import free_generator

Outputs = Sequence[Tensor]


class Backend(Protocol):
    """Records computations on one device."""

    def capture(self, run: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """Record what `run` computes.

        Args:
            run: reads tensors that stay where they are, and returns new ones.

        Returns:
            Outputs whose values nobody has computed yet, and what computes them: each call writes
            the same tensors, from what the inputs then hold.
        """


class CudaGraphs:
    """CUDA graphs of one memory pool.

    What one graph has freed may be where a later one keeps its tensors, so two graphs may be under
    way together only in the order in which they were captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """As `Backend` has it; raises what `run` or the capture raises."""
        drawn = torch.get_rng_state()
        outside = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        )
        try:
            with torch.cuda.device(self.device), recording:
                outputs = run()
        except BaseException:
            torch.cuda.set_stream(outside)  # a capture that breaks off does not
            self.stream = torch.cuda.Stream(self.device)
            free_generator(self.device)
            raise
        if not torch.equal(torch.get_rng_state(), drawn):  # such as LoHa's module dropout
            torch.set_rng_state(drawn)
            raise RuntimeError("random numbers drawn on the host, which a graph would repeat")
        return outputs, graph.replay
