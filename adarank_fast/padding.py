"""Batches without their right padding: items of like length together, trimmed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adarank_fast.batches import batch_size
from adarank_fast.outputs import Batch, Output, accepted
from adarank_fast.replay import is_same

LENGTH_STEP = 8  # items whose lengths agree up to this go together


def remove_padding(model: nn.Module, output: Output, batches: Sequence[Batch]) -> list[Batch]:
    """Split batches by length, if the model gives an item the same output without its padding.

    Whether it does is tried on the item with the most padding. Batches without a right-padded
    `attention_mask` [B, T], or with other tensors in which T shows up, stay as they are.

    Args:
        model: in eval mode.
        output: what must stay the same.
        batches: keyword inputs.
    """
    parts = [part for batch in batches for part in _split(batch)]
    if len(parts) == len(batches):
        return list(batches)
    root = model.get_submodule(output.root)

    def read(batch: Batch) -> Tensor:
        return output.read(root(**accepted(root, batch)), batch)

    def padding(batch: Batch) -> Tensor:
        return (batch["attention_mask"] == 0).sum(1)  # of each item

    padded = max(filter(_trimmable, batches), key=lambda batch: int(padding(batch).max()))
    item = padding(padded).argmax()[None]
    single = _items(padded, item, padded["attention_mask"].shape[1])
    whole, trimmed = read(single), read(_split(single)[0])
    if trimmed.dim() > 2 and whole.dim() > 2:
        whole = whole[:, : trimmed.shape[1]]
    return parts if is_same(trimmed, whole) else list(batches)


def _trimmable(batch: Batch) -> bool:
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != batch_size(batch):
        return False
    if not torch.equal(mask != 0, mask.cummin(1).values != 0):  # not padded on the right
        return False
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    width = mask.shape[1]
    return all(
        len(t) == len(mask) and width not in t.shape[2:] for t in tensors if width in t.shape
    )


def _split(batch: Batch) -> list[Batch]:
    if not _trimmable(batch):
        return [batch]
    lengths = (batch["attention_mask"] != 0).sum(1).clamp_min(1)
    steps = (lengths + LENGTH_STEP - 1) // LENGTH_STEP
    groups = [torch.nonzero(steps == step)[:, 0] for step in steps.unique()]
    return [_items(batch, rows, int(lengths[rows].max())) for rows in groups]


def _items(batch: Batch, rows: Tensor, length: int) -> Batch:
    """Some items, their positions cut to `length`."""
    size, width = batch["attention_mask"].shape

    def cut(key: str, value: object) -> object:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != size:
            return value
        value = value[rows]
        of_the_encoder = value.shape[1:2] == (width,) and not key.startswith("decoder_")
        return value[:, :length] if of_the_encoder else value

    return {key: cut(key, value) for key, value in batch.items()}
