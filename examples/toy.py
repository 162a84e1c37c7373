"""A toy tokenizer, labelled texts and a small encoder, so that the examples need no download."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

GOOD, BAD = ["good", "fine", "great", "lovely"], ["bad", "poor", "awful", "dull"]
OTHER = [f"word{i}" for i in range(50)]


def texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label): a text is "positive" if it holds more good words than bad ones."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        label = ("negative", "positive")[i % 2]
        words = draw.choices(OTHER, k=8) + draw.choices(GOOD if i % 2 else BAD, k=2)
        draw.shuffle(words)
        found.append((" ".join(words), label))
    return found


def save_encoder(folder: Path) -> None:
    """A random BERT of two layers with its tokenizer, as `from_pretrained` reads them."""
    words = ["[PAD]", "[UNK]", *GOOD, *BAD, *OTHER]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    config = BertConfig(
        vocab_size=len(words), num_attention_heads=4, architectures=["BertModel"], **sizes
    )
    BertModel(config).save_pretrained(folder)
