"""Give modules another `forward` for a while, and put a model into a state fit for probing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]


@contextmanager
def patched(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Give modules another `forward`; take it away again, whatever happens."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward_before in before.items():
            if forward_before is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward_before


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, every module's own forward; all as before at the end.

    `torch.nn.TransformerEncoder` in eval mode reads weights without calling its modules until the
    fast path of `torch.backends.mha` is off.
    """
    training = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in training.items():
            module.training = mode
