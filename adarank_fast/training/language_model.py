"""Language models on TRL's `SFTTrainer`: text, prompts and completions, chats."""

from __future__ import annotations

import copy
import logging
import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from adarank_fast.errors import AdarankError
from adarank_fast.models.identity import digest_data
from adarank_fast.models.text import first_line
from adarank_fast.training.arguments import Fields, make_arguments, read_settings
from adarank_fast.training.data import Data
from adarank_fast.training.evaluation import evaluate, metrics
from adarank_fast.training.tokens import Item, collate, pad_id, some
from adarank_fast.training.trainer import Watch, Watched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer

TOKENS = 4096  # of a batch that is measured; there is a logit for every token and word
CALIBRATED = 512  # tokens of an example that ranks are predicted on
WHAT_COUNTS = ("max_length", "completion_only_loss", "assistant_only_loss", "eos_token")
Row = Mapping[str, Any]  # TRL's columns: text; prompt and completion; or messages


@cache
def _trainer_class() -> type[SFTTrainer]:
    from trl import SFTTrainer

    class WatchedSFTTrainer(Watched, SFTTrainer):
        pass

    return WatchedSFTTrainer


def make_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    arguments: SFTConfig,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTTrainer:
    """An `SFTTrainer`, which tokenises the rows: templates, loss on completions, packing.

    Args:
        model: with adapters.
        tokenizer: with a chat template where rows are chats.
        rows: to train on, in TRL's columns.
        held_out: to evaluate on, in the same columns; may be empty.
        arguments: an `SFTConfig`.
        callbacks: beside `Watch`.

    Raises:
        AdarankError: TRL refuses the arguments or the rows.
    """
    from datasets import Dataset

    if tokenizer.eos_token is None and arguments.eos_token is None:
        raise AdarankError(
            "the tokenizer has no end-of-text token, so the model would not learn to stop; name "
            "one of its tokens with --set eos_token=..."
        )
    try:
        with _quiet():
            trainer = _trainer_class()(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_list([dict(row) for row in rows]),
                eval_dataset=Dataset.from_list([dict(row) for row in held_out]),
                processing_class=tokenizer,
                callbacks=[Watch(), *callbacks],
            )
    except AdarankError:
        raise
    except Exception as error:  # of templates (jinja2), columns, values that exclude each other
        raise AdarankError(f"SFTTrainer refuses: {first_line(error)}") from error
    if not len(trainer.train_dataset):
        raise AdarankError(
            f"no row has anything to learn within max_length = {arguments.max_length}; raise it"
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


class LanguageModel:
    """Rows in TRL's columns: to train on, to measure on, to predict ranks on.

    Args:
        data: texts, prompts with completions, or chats.
        held_out: to measure on; None: some of `data`.
        tokenizer: of the model.
        settings: max_length and chat_template_path are looked at.

    Raises:
        AdarankError: chats, and the tokenizer has no template for them; or that file is none.
    """

    def __init__(
        self,
        data: Data,
        held_out: Data | None,
        tokenizer: PreTrainedTokenizerBase,
        settings: Fields,
    ) -> None:
        self.tokenizer, self.rows = tokenizer, list(data.rows)
        self.held_out = some(self.rows) if held_out is None else list(held_out.rows)
        self._length = min(int(settings.get("max_length") or CALIBRATED), CALIBRATED)
        if template := settings.get("chat_template_path"):
            if not str(template).endswith((".jinja", ".j2")) or not os.path.isfile(template):
                raise AdarankError(
                    f"chat_template_path={template!r} must be a .jinja file; a model's template is "
                    "its chat_template.jinja"
                )
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        if data.form == "chat":
            check_template(tokenizer)

    def digest(self) -> str:
        """Of what is trained on."""
        return digest_data(self.rows)

    def calibration(
        self, count: int, device: torch.device, batch_size: int = 8
    ) -> list[dict[str, Tensor]]:
        """Batches of so many of the rows, as training sees them."""
        items = []
        for row in some(self.rows, count):
            text, chat = full_text(row, self.tokenizer), is_chat(row)
            ids = self.tokenizer(text, add_special_tokens=not chat)["input_ids"][: self._length]
            if ids:
                items.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
        if not items:
            raise AdarankError("the tokenizer makes no tokens of the data; look at their columns")
        pad, starts = pad_id(self.tokenizer), range(0, len(items), batch_size)
        batches = [collate(items[start : start + batch_size], pad) for start in starts]
        return [{key: value.to(device) for key, value in batch.items()} for batch in batches]

    def trainer(
        self,
        model: nn.Module,
        arguments: SFTConfig,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> SFTTrainer:
        """See `make_trainer`."""
        rows = (self.rows, self.held_out)
        return make_trainer(model, self.tokenizer, *rows, arguments, callbacks)

    def measure(self, trainer: SFTTrainer) -> dict[str, float]:
        """Metrics of the trainer's model; see `evaluation.metrics`."""
        items = items_of(trainer.eval_dataset)
        if not items:
            raise AdarankError("no evaluation row has anything to predict; raise max_length")
        size = batch_of(items, trainer.args.per_device_eval_batch_size)
        return metrics(evaluate(trainer.model, items, pad_id(self.tokenizer), size))


def batch_of(items: Sequence[Item], batch_size: int) -> int:
    """Items of a language model a batch: fewer where they are long."""
    longest = max(len(item["input_ids"]) for item in items)
    return max(min(batch_size, TOKENS // longest), 1)


def tokenise(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: Fields
) -> list[Item]:
    """Rows as `SFTTrainer` tokenises them, for a model that is not to be trained.

    The trainer gets a model of its own, since it changes the one that it gets.

    Args:
        rows: in TRL's columns.
        tokenizer: not changed.
        settings: fields of `SFTConfig`; those that say what counts are looked at.

    Raises:
        AdarankError: see `make_trainer`.
    """
    given = {name: settings[name] for name in WHAT_COUNTS if name in settings}
    stand_in = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with tempfile.TemporaryDirectory() as scratch, _random_state_kept():
        fields = {**read_settings("causal-lm"), "save_strategy": "no", **given}
        arguments = make_arguments("causal-lm", fields, scratch)
        model = LlamaForCausalLM(stand_in)
        trainer = make_trainer(model, copy.deepcopy(tokenizer), rows, rows[:1], arguments)
    return items_of(trainer.train_dataset)


def items_of(dataset: Iterable[Item]) -> list[Item]:
    """What `SFTTrainer` made of rows, as items: ids, mask and labels."""
    return [
        {
            "input_ids": row["input_ids"],
            "attention_mask": [1] * len(row["input_ids"]),
            "labels": row["labels"],
        }
        for row in dataset
    ]


def is_chat(row: Row) -> bool:
    """Whether a row has messages, which the chat template turns into text."""
    return "messages" in row or not isinstance(row.get("prompt", ""), str)


def full_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row as the model sees it in training, template included.

    Raises:
        AdarankError: the chat template refuses the row, or there is none.
    """
    if "text" in row:
        return str(row["text"])
    if not is_chat(row):
        return str(row["prompt"] + row["completion"])
    return apply_template(tokenizer, row.get("messages") or row["prompt"] + row["completion"])


def prompt_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt of a row: all of it but the completion or the last answer.

    Raises:
        AdarankError: the chat template refuses the row, or there is none.
    """
    if "text" in row:
        return str(row["text"])
    prompt = row["prompt"] if "prompt" in row else row["messages"]
    if isinstance(prompt, str):
        return prompt
    if "messages" in row and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    return apply_template(tokenizer, prompt, answer=True)


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Row], answer: bool = False
) -> str:
    """Messages as text, for an answer or whole.

    Raises:
        AdarankError: the chat template refuses them, or there is none.
    """
    check_template(tokenizer)
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(one) for one in messages], tokenize=False, add_generation_prompt=answer
            )
        )
    except Exception as error:  # whatever the template raises
        raise AdarankError(f"the chat template refuses a chat: {first_line(error)}") from error


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise AdarankError(
            "the data are chats and the tokenizer has no chat template; take the chat (instruct) "
            "model, or give a template: --set chat_template_path=FILE.jinja"
        )


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """A trainer seeds Python's, numpy's and torch's generators when it is made."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of `datasets`, one for each of six passes over the rows."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    was_on = not are_progress_bars_disabled()
    disable_progress_bars()
    logger = logging.getLogger("trl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if was_on:
            enable_progress_bars()
