"""Batches of few lengths, for what is compiled or captured once a shape."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor
from torch.nn.functional import pad

from adarank_fast.errors import AdarankError
from adarank_fast.json_values import said
from adarank_fast.models.batches import Batch

PADDING = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "position_ids": 0}


class BucketCollator:
    """A data collator whose batches have one of a few lengths.

    Args:
        collator: of `transformers` or one's own: rows -> a dict with "input_ids" [B, T] among its
            tensors. Those of size T in their second dimension are padded on the right: labels with
            -100, masks with 0, input_ids with `pad_token_id`, others with 0.
        lengths: that batches are padded to, the next larger one each; longer batches stay as they
            are.
        pad_token_id: of the tokenizer.

    Raises:
        AdarankError: a length is not a positive integer, or there is none.
    """

    def __init__(
        self,
        collator: Callable[[Sequence[object]], Batch],
        lengths: Iterable[int],
        pad_token_id: int,
    ) -> None:
        given = list(lengths)
        if not given or not all(type(length) is int and length > 0 for length in given):
            raise AdarankError(f"lengths must be positive integers, got {said(given)}")
        self.collator, self.lengths, self.pad_token_id = collator, sorted(given), pad_token_id

    def __call__(self, rows: Sequence[object]) -> Batch:
        """The collator's batch, padded.

        Raises:
            AdarankError: it has no attention_mask, without which padding would be attended to.
        """
        batch = self.collator(rows)
        length = batch["input_ids"].shape[1]
        place = bisect_left(self.lengths, length)
        missing = self.lengths[place] - length if place < len(self.lengths) else 0
        if not missing:
            return batch
        if "attention_mask" not in batch:
            raise AdarankError(
                "the collator returns no attention_mask, so padding would be read as text; use one "
                "that does, or pad in it"
            )
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == length:
                filler = self.pad_token_id if name == "input_ids" else PADDING.get(name, 0)
                batch[name] = pad(value, (0, missing), value=filler)
        return batch
