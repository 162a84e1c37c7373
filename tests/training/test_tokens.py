"""Batches of texts."""

from __future__ import annotations

import pytest
import torch

from adarank_fast.training.tokens import add_decoder_inputs, collate, make_batches


class Tokenizer:
    """One token a letter; no pad token."""

    pad_token_id = None
    eos_token_id = 9
    bos_token_id = None
    model_max_length = 5
    model_input_names = ["input_ids", "attention_mask"]

    def __call__(self, texts, truncation, max_length):
        ids = [[ord(c) - 96 for c in text][:max_length] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "extra": ids}


def test_batches_in_order_padded_on_the_right():
    first, second = make_batches(Tokenizer(), ["ab", "abc", "abcdefgh"], batch_size=2)
    assert set(first) == {"input_ids", "attention_mask"}
    assert first["input_ids"].tolist() == [[1, 2, 9], [1, 2, 3]]
    assert first["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert second["input_ids"].tolist() == [[1, 2, 3, 4, 5]]  # the tokenizer's own limit
    assert first["input_ids"].dtype == torch.int64


def test_max_length():
    (batch,) = make_batches(Tokenizer(), ["abc", "d"], max_length=2)
    assert batch["input_ids"].tolist() == [[1, 2], [4, 9]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"texts": []}, "texts is empty"),
        ({"texts": ["a", ""]}, "no tokens"),
        ({"texts": ["a"], "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"texts": ["a"], "max_length": 0}, "max_length must be at least 1, got 0"),
    ],
)
def test_bad_batches(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_batches(Tokenizer(), **arguments)


def test_collate_keeps_numbers():
    items = [{"input_ids": [1, 2], "labels": 3}, {"input_ids": [4], "labels": 5}]
    batch = collate(items, pad=7)
    assert batch["input_ids"].tolist() == [[1, 2], [4, 7]]
    assert batch["labels"].tolist() == [3, 5]


def test_decoder_gets_the_text_shifted():
    (batch,) = add_decoder_inputs(make_batches(Tokenizer(), ["abc", "d"]), start=8)
    assert batch["decoder_input_ids"].tolist() == [[8, 1, 2], [8, 4, 9]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
