"""Texts as token ids: batches for calibration, items for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from adarank_fast.errors import AdarankError
from adarank_fast.training.data_files import quote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = dict[str, Any]  # one item's model inputs, lists of token ids; labels: a number or a list
T = TypeVar("T")
IGNORED = -100  # a label that counts for nothing: transformers' and torch's own


def make_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 16,
    max_length: int = 128,
    special_tokens: bool = True,
) -> list[dict[str, Tensor]]:
    """Tokenise texts into batches, in order, each padded on the right to its longest text.

    Args:
        tokenizer: of transformers; one without a pad token (GPT-2, Llama) will do.
        texts: at least one.
        batch_size: texts a batch.
        max_length: longer texts are cut to this many tokens, or to the tokenizer's own limit.
        special_tokens: whether the tokenizer adds its own; a chat template wrote them already.

    Returns:
        Dicts of [B, T] int64 tensors: input_ids, attention_mask and what else the model takes.
    """
    for argument, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise AdarankError(f"{argument} must be at least 1, got {value}")
    if not texts:
        raise AdarankError("texts is empty; give at least one")
    limit = min(max_length, tokenizer.model_max_length)
    plain = {} if special_tokens else {"add_special_tokens": False}
    tokenised = tokenizer(list(texts), truncation=True, max_length=limit, **plain)
    items = [
        {key: tokenised[key][i] for key in tokenised if key in tokenizer.model_input_names}
        for i in range(len(texts))
    ]
    for text, item in zip(texts, items, strict=True):
        if not item["input_ids"]:
            raise AdarankError(f"the tokenizer makes no tokens of {quote(text)}; leave it out")
    pad = pad_id(tokenizer)
    return [collate(items[i : i + batch_size], pad) for i in range(0, len(items), batch_size)]


def encode_labelled(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[str],
    classes: Sequence[str],
    max_length: int,
) -> list[Item]:
    """Token ids and the label's number of each text.

    Args:
        tokenizer: of the model.
        texts: one an item.
        classes: the place of a label here is its number.
        labels: one a text, each one of `classes`.
        max_length: longer texts are cut.
    """
    numbers = {label: number for number, label in enumerate(classes)}
    tokenised = tokenizer(
        list(texts), truncation=True, max_length=min(max_length, tokenizer.model_max_length)
    )
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": numbers[label]}
        for ids, mask, label in zip(
            tokenised["input_ids"], tokenised["attention_mask"], labels, strict=True
        )
    ]


def encode_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> list[Item]:
    """Texts for a language model: joined by the end-of-text token, cut into blocks.

    Args:
        tokenizer: of the model.
        texts: in their order.
        length: tokens a block; what is left over at the end is dropped.

    Raises:
        AdarankError: there is less than one block of text.
    """
    length = min(length, tokenizer.model_max_length)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        stream += ids + end
    blocks = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    if not blocks:
        raise AdarankError(
            f"the texts make {len(stream):,} tokens, less than one block of {length}; give more "
            "text or a smaller max_length"
        )
    return [
        {"input_ids": ids, "attention_mask": [1] * length, "labels": list(ids)} for ids in blocks
    ]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What to pad with; it is masked, so any token will do where there is no pad token."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
    return next(candidate for candidate in candidates if candidate is not None)


def collate(items: Sequence[Mapping[str, object]], pad: int) -> dict[str, Tensor]:
    """Lists padded on the right to the longest; numbers kept.

    Args:
        items: at least one, all with the same keys.
        pad: fills input_ids; labels are filled with `IGNORED`, everything else with 0.

    Returns:
        key -> [B, T] for lists, [B] for numbers; int64.
    """
    batch = {}
    for key in items[0]:
        values = [torch.tensor(item[key]) for item in items]
        if values[0].dim():
            filler = {"input_ids": pad, "labels": IGNORED}.get(key, 0)
            batch[key] = torch.nn.utils.rnn.pad_sequence(values, True, filler)
        else:
            batch[key] = torch.stack(values)
    return batch


def add_decoder_inputs(
    batches: Sequence[Mapping[str, Tensor]], start: int
) -> list[dict[str, Tensor]]:
    """Give the decoder of a sequence-to-sequence model the input text, shifted right by one.

    Args:
        batches: as `make_batches` returns them.
        start: the model's decoder_start_token_id.
    """
    return [
        {
            **batch,
            "decoder_input_ids": torch.nn.functional.pad(
                batch["input_ids"][:, :-1], (1, 0), value=start
            ),
            "decoder_attention_mask": batch["attention_mask"],
        }
        for batch in batches
    ]


def item_length(item: Item) -> int:
    """Tokens of an item; 0 if it has no token ids."""
    return len(item["input_ids"]) if "input_ids" in item else 0


def some(items: Sequence[T], count: int = 256) -> list[T]:
    """At most so many of them, evenly spaced: files are often sorted."""
    step = len(items) / max(min(count, len(items)), 1)
    return [items[int(index * step)] for index in range(min(count, len(items)))]
