"""A tiny tokenizer, labelled texts, and folders of tiny models for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import VOCABULARY, tiny

WORDS = [f"word{i}" for i in range(VOCABULARY - 3)]
EXAMPLES = [
    (" ".join(WORDS[(7 * i + j * (1 + i % 2)) % len(WORDS)] for j in range(3 + i % 5)), "ab"[i % 2])
    for i in range(60)
]


def tokenizer(padding: bool = True) -> Any:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "</s>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    pad = {"pad_token": "[PAD]"} if padding else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", eos_token="</s>", **pad
    )


def save_tiny(kind: str, folder: Path, layers: int = 2, padding: bool = True) -> Path:
    """A tiny model with its tokenizer, as `from_pretrained` takes it."""
    model = tiny(kind, layers=layers)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    tokenizer(padding).save_pretrained(folder)
    return folder
