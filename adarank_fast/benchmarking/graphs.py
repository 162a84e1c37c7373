"""Training steps as CUDA graphs: without Python and launches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adarank_fast.benchmarking.arms import step_of, trainable
from adarank_fast.benchmarking.measure import Step
from adarank_fast.models.batches import Batch

WARM_UP = 3  # calls on the side stream, as torch asks for


def graphed(model: nn.Module, batch: Batch) -> Step:
    """A replay of one whole training step of the model: forward, loss, backward, AdamW.

    Args:
        model: on a CUDA device.
        batch: keyword inputs; a mask of ones is left out, since models look at its values, for
            which a capture cannot wait.

    Raises:
        RuntimeError: the step cannot be captured.
        ArithmeticError: a replay does not write every gradient anew.
    """
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and bool(mask.all()):
        batch = {key: value for key, value in batch.items() if key != "attention_mask"}
    step = step_of(model, batch, capturable=True)
    outside, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(outside)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    outside.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            step()
    except Exception:
        torch.cuda.set_stream(outside)  # a capture that breaks off leaves its own
        raise
    found = [p.grad for p in trainable(model) if p.grad is not None]
    with torch.no_grad():
        for gradient in found:
            gradient.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    if not all(bool(gradient.isfinite().all()) for gradient in found):
        raise ArithmeticError("a replay leaves gradients unwritten")
    return graph.replay
