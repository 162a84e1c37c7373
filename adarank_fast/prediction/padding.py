"""Batches without their right padding: items of one length together, from whichever batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adarank_fast.models.batches import Batch, batch_size
from adarank_fast.models.outputs import Output, accepted
from adarank_fast.prediction.tolerance import is_same, rounding

# What one more batch costs, in positions: if it saves fewer, padding some items is cheaper. On two
# cores a forward of a block takes 250 tokens' time more than its tokens do, for 20 variants folded.
BATCH_COST = {"cpu": 12}
DEFAULT_COST = 512


def remove_padding(model: nn.Module, output: Output, batches: Sequence[Batch]) -> list[Batch]:
    """Sort items by length, if the model gives an item the same output without its padding.

    Whether it does is tried on the item with the most padding. Batches without a right-padded
    `attention_mask` [B, T], or with other tensors in which T shows up, stay as they are.

    Args:
        model: in eval mode.
        output: what must stay the same.
        batches: keyword inputs.
    """
    if not any(_padding(batch).any() for batch in batches if _trimmable(batch)):
        return list(batches)
    root = model.get_submodule(output.root)

    def read(batch: Batch) -> Tensor:
        return output.read(root(**accepted(root, batch)), batch)

    padded = max(filter(_trimmable, batches), key=lambda batch: int(_padding(batch).max()))
    item = _padding(padded).argmax()[None]
    single = _items(padded, item, padded["attention_mask"].shape[1])
    try:
        whole, trimmed = read(single), read(_sorted_by_length([single])[0])
    except Exception:  # any error of a model on an item alone, or to another length
        return list(batches)
    if trimmed.dim() > 2 and whole.dim() > 2:
        whole = whole[:, : trimmed.shape[1]]
    same = is_same(trimmed, whole, rounding(root))
    return _sorted_by_length(batches) if same else list(batches)


def _padding(batch: Batch) -> Tensor:
    """Masked positions of each item."""
    mask: Tensor = batch["attention_mask"]
    return (mask == 0).sum(1)


def _sorted_by_length(batches: Sequence[Batch]) -> list[Batch]:
    """Items of like length and kind joined; what cannot be trimmed stays as it is."""
    trimmable = [batch for batch in batches if _trimmable(batch)]
    kinds: dict[tuple[object, ...], list[Batch]] = {}
    for batch in trimmable:
        kinds.setdefault(_kind(batch), []).append(batch)
    parts = [batch for batch in batches if not any(batch is other for other in trimmable)]
    for alike in kinds.values():
        for lengths, ceiling in _buckets(torch.cat([_lengths(batch) for batch in alike])):
            pieces = []
            for batch in alike:
                chosen = [length in lengths for length in _lengths(batch).tolist()]
                rows = torch.tensor(chosen).nonzero()[:, 0].to(batch["attention_mask"].device)
                if len(rows):
                    pieces.append(_items(batch, rows, ceiling))
            parts.append(_join(pieces))
    return parts


def _kind(batch: Batch) -> tuple[object, ...]:
    """What batches that can be joined have in common: keys, widths, types, all that has no rows."""
    size = batch_size(batch)
    return tuple(
        (key, *value.shape[1:], value.dtype)
        if isinstance(value, Tensor) and value.dim() and len(value) == size
        else (key, id(value) if isinstance(value, Tensor) else repr(value))
        for key, value in batch.items()
    )


def _lengths(batch: Batch) -> Tensor:
    mask: Tensor = batch["attention_mask"]
    return (mask != 0).sum(1).clamp_min(1)


def _buckets(lengths: Tensor) -> list[tuple[set[int], int]]:
    """Which lengths go together, and the length they are cut to: the least padding and batches.

    cost of a batch = items · longest + what one more batch costs; the best split of the sorted
    lengths, by dynamic programming.
    """
    extra = BATCH_COST.get(lengths.device.type, DEFAULT_COST)
    values, counts = (t.tolist() for t in lengths.unique(return_counts=True))
    # cost of the first j lengths, start of the last batch
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(values) + 1):
        best.append(
            min(
                (best[start][0] + sum(counts[start:stop]) * values[stop - 1] + extra, start)
                for start in range(stop)
            )
        )
    buckets, stop = [], len(values)
    while stop:
        start = best[stop][1]
        buckets.append((set(values[start:stop]), values[stop - 1]))
        stop = start
    return buckets[::-1]


def _join(pieces: Sequence[Batch]) -> Batch:
    size = batch_size(pieces[0])

    def cat(key: str) -> object:
        value = pieces[0][key]
        if not isinstance(value, Tensor) or not value.dim() or len(value) != size:
            return value
        return torch.cat([piece[key] for piece in pieces])

    return dict(pieces[0]) if len(pieces) == 1 else {key: cat(key) for key in pieces[0]}


def _trimmable(batch: Batch) -> bool:
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != batch_size(batch):
        return False
    if not torch.equal(mask != 0, mask.cummin(1).values != 0):  # not padded on the right
        return False
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    width = mask.shape[1]
    if any(len(t) not in (1, len(mask)) for t in tensors):  # images packed over the items, say
        return False
    return all(
        len(t) == len(mask) and width not in t.shape[2:] for t in tensors if width in t.shape
    )


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
