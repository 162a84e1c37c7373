"""Digests: what tells one model's weights, or one data set, from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adarank_fast.models.quantization import stored


def digest_weights(model: nn.Module) -> str:
    """SHA-256 over every parameter's name and shape and up to 256 of its numbers."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = stored(parameter).flatten()
        some = flat[:: max(flat.numel() // 256, 1)][:256]
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_data(items: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over keys and values, in the order of the items.

    Args:
        items: batches or examples, whose values are tensors or what JSON can hold.
    """
    digest = hashlib.sha256()
    for item in items:
        for key, value in sorted(item.items()):
            if isinstance(value, Tensor):
                digest.update(f"{key}{tuple(value.shape)}".encode())
                digest.update(value.detach().double().cpu().numpy().tobytes())
            else:
                digest.update(f"{key}{json.dumps(value)}".encode())
    return digest.hexdigest()
