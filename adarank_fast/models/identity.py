"""Digests that tell one model, one set of batches or one set of items from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adarank_fast.models.outputs import Batch
from adarank_fast.models.quantization import stored


def digest_weights(model: nn.Module) -> str:
    """What tells one set of weights from another: up to 256 numbers of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = stored(parameter).flatten()
        some = flat[:: max(flat.numel() // 256, 1)][:256]
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe_batches(batches: Sequence[Batch]) -> dict[str, Any]:
    """How much calibration data there was, and a digest to recognise it by."""
    digest = hashlib.sha256()
    items = 0
    for batch in batches:
        tensors = [(k, v) for k, v in sorted(batch.items()) if isinstance(v, Tensor)]
        items += tensors[0][1].shape[0] if tensors else 0
        for key, value in tensors:
            digest.update(f"{key}{tuple(value.shape)}".encode())
            digest.update(value.detach().double().cpu().numpy().tobytes())
    return {"count": len(batches), "items": items, "sha256": digest.hexdigest()}


def digest(items: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]


def digest_model(model: nn.Module) -> str:
    """Of every parameter's name, shape and first values: other weights give another one."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:64].float().cpu().numpy()
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(first.tobytes())
    return digest.hexdigest()[:16]
