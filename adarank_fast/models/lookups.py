"""Look-ups beyond the end of an embedding table, named before they are made.

On a GPU such a look-up makes the GPU unusable for the whole process, and the error names nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from adarank_fast.models.forward_patching import ForwardPatches, Patch, TensorForward


@contextmanager
def checked_lookups(model: nn.Module) -> Iterator[None]:
    """Each table of `model` looks at its indices first.

    Raises:
        IndexError: from a forward in the context: which table, how long, and the index.
    """
    tables: dict[nn.Module, Patch] = {
        module: partial(_checked, name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    }
    with ForwardPatches(tables).applied():
        yield


def _checked(name: str, table: nn.Embedding, original: TensorForward) -> TensorForward:
    def forward(indices: Tensor) -> Tensor:
        if indices.numel():
            least, most = (int(end) for end in torch.aminmax(indices))
            if least < 0 or most >= table.num_embeddings:
                odd = least if least < 0 else most
                raise IndexError(f"{name} has {table.num_embeddings} rows and is asked for {odd}")
        return original(indices)

    return forward
