"""Batches: keyword inputs of a model, checked, cut and folded (repeated along dimension 0)."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adarank_fast.errors import AdarankError, AdarankTypeError
from adarank_fast.models.torch_private import map_leaves

Batch = dict[str, Any]  # keyword inputs of a model

MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


def batch_size(batch: Batch) -> int:
    """B: the first size of the main input, else of the first tensor."""
    tensors = [batch[key] for key in MAIN_INPUTS if isinstance(batch.get(key), Tensor)]
    tensors += [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    return int(tensors[0].shape[0])


def take(batch: Batch, items: int) -> Batch:
    """The first `items` items of a batch."""
    size = batch_size(batch)
    taken: Batch = map_leaves(
        Tensor, lambda t: t[:items] if t.dim() and t.shape[0] == size else t, batch
    )
    return taken


def fold(batch: Batch, folds: int) -> Batch:
    """The batch `folds` times over: every tensor with B rows is repeated, the rest is shared."""
    size = batch_size(batch)
    folded: Batch = map_leaves(
        Tensor, lambda t: repeat(t, folds) if t.dim() and t.shape[0] == size else t, batch
    )
    return folded


def in_dtype(batches: Iterable[Batch], dtype: torch.dtype) -> list[Batch]:
    """The batches with their floating-point tensors cast."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return [map_leaves(Tensor, cast, batch) for batch in batches]


def repeat(tensor: Tensor, folds: int) -> Tensor:
    """[B, ...] -> [folds * B, ...], the whole batch `folds` times in a row."""
    return tensor.repeat(folds, *[1] * (tensor.dim() - 1))


def prepare_batches(model: nn.Module, batches: Iterable[Batch]) -> list[Batch]:
    """Check the batches and choose what the model is given: no labels, no cache.

    Raises:
        AdarankTypeError: a batch is not a dict with tensors.
        AdarankError: no batches, an empty one, a key the model does not know, another device.
    """
    prepared: list[Batch] = []
    parameters = inspect.signature(type(model).forward).parameters
    device = next((p.device for p in model.parameters()), None)
    for number, batch in enumerate(batches):
        where = f"batches[{number}]"
        if not isinstance(batch, Mapping):
            raise AdarankTypeError(
                f"{where} must be a dict of the model's keyword inputs, got {type(batch).__name__}"
            )
        inputs = dict(batch)
        with torch.inference_mode(False):  # no code of ours or the model's can rely on the others
            inputs = map_leaves(Tensor, lambda t: t.clone() if t.is_inference() else t, inputs)
        _check_keys(where, inputs, parameters)
        labels = inputs.pop("labels", None)
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if isinstance(labels, Tensor) and shift and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = shift(labels=labels)
            inputs.setdefault("decoder_attention_mask", (labels != -100).long())
        if not any(isinstance(v, Tensor) and v.dim() for v in inputs.values()):
            raise AdarankTypeError(f"{where} holds no tensor (keys: {', '.join(map(str, inputs))})")
        if not batch_size(inputs):
            raise AdarankError(f"{where} holds no items; leave it out")
        for key, value in inputs.items():
            if isinstance(value, Tensor) and device is not None and value.device != device:
                if not hasattr(model, "hf_device_map"):
                    raise AdarankError(
                        f"{where}[{key!r}] is on {value.device}, the model on {device}; "
                        f"move it with .to({str(device)!r})"
                    )
        if "use_cache" in parameters:
            inputs["use_cache"] = False
        prepared.append(inputs)
    if not prepared:
        raise AdarankError("batches is empty; pass at least one batch of the model's inputs")
    return prepared


def _check_keys(where: str, inputs: Batch, parameters: Mapping[str, inspect.Parameter]) -> None:
    names = [
        n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in inputs:
        near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.8)
        if key not in names and key != "labels" and (near or not open_ended):
            raise AdarankError(
                f"{where} has the key {key!r}, which the model does not take; "
                + (f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(names[1:])}")
            )
