"""What a comparison trains: a model that can be made again and again, and its items."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy
from torch import nn

from adarank_fast.comparison.metrics import Metric
from adarank_fast.errors import AdarankError, AdarankTypeError
from adarank_fast.training.data import Data, as_data, check_alike, for_task, hold_out, read_data
from adarank_fast.training.evaluation import Evaluation
from adarank_fast.training.language_model import tokenise
from adarank_fast.training.loading import (
    LoraOptions,
    check_task,
    load_tokenizer,
    model_factory,
)
from adarank_fast.training.tokens import (
    IGNORED,
    Item,
    collate,
    encode_blocks,
    encode_labelled,
    pad_id,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adarank_fast.models.batches import Batch

VALIDATION_SHARE = 0.1  # of the training items, for the sweep
HELD_OUT_SHARE = 0.2  # of the data, where no held-out data are given
CALIBRATION_ITEMS, CALIBRATION_BATCH = 32, 16
CALIBRATION_TOKENS = 2048  # a language model's blocks can be long; fewer items then
Given = str | os.PathLike[str] | Data | Sequence[object]


@dataclass(frozen=True)
class Experiment:
    """What is trained: a model that can be made again and again, and its items."""

    name: str
    task: str
    factory: Callable[[], nn.Module]
    lora_config: LoraOptions  # more arguments of the LoraConfig
    pad: int
    classes: int | None
    train: list[Item]
    held_out: list[Item]


def make_experiment(
    model: str | os.PathLike[str] | Callable[[], nn.Module],
    train_data: Given,
    eval_data: Given | None,
    task: str,
    tokenizer: PreTrainedTokenizerBase | None,
    modules_to_save: Sequence[str] | None,
    max_length: int,
    dtype: str,
) -> Experiment:
    """Read the data, choose the task, and see how the model is made; see `compare`."""
    train = _read(train_data, task)
    held_out = None if eval_data is None else _read(eval_data, task)
    if held_out is None:
        if not isinstance(train, Data):
            raise AdarankError("tokenised train_data need eval_data beside them")
        train, held_out = hold_out(train, HELD_OUT_SHARE)
    name = getattr(model, "__name__", type(model).__name__) if callable(model) else str(model)
    if isinstance(train, Data) and isinstance(held_out, Data):
        if tokenizer is None and callable(model):
            raise AdarankError("texts for a model made by a function need tokenizer=")
        task, names = train.task, train.classes
        if not callable(model):
            check_task(name, task)
        if task == "classification" and len(names) < 2:
            raise AdarankError(
                f"classification needs two classes, the data have only {''.join(names)!r}"
            )
        check_alike(train, held_out)
        tokenizer = tokenizer or load_tokenizer(name)
        pad = pad_id(tokenizer)
        sides = [_encode(tokenizer, part, names, max_length) for part in (train, held_out)]
    elif isinstance(train, list) and isinstance(held_out, list):
        sides, pad = [train, held_out], 0
        task, names = _describe_items(train + held_out, task)
        if not callable(model):
            check_task(name, task)
    else:
        raise AdarankError("train_data and eval_data must both be texts or both tokenised items")
    if callable(model):
        factory = model
        lora_config: LoraOptions = {}
        if modules_to_save:
            lora_config = {"modules_to_save": list(modules_to_save)}
    else:
        factory, lora_config = model_factory(name, task, names, tokenizer, dtype)
    classes = len(names) or None
    return Experiment(Path(name).name, task, factory, lora_config, pad, classes, *sides)


def _read(given: Given, task: str) -> Data | list[Item]:
    if isinstance(given, (str, os.PathLike)):
        return read_data(given, task=task)
    if isinstance(given, Data):
        return for_task(given, task)
    rows = list(given)
    if (data := as_data(rows)) is not None:
        return for_task(data, task)
    if rows and all(isinstance(row, dict) and "labels" in row for row in rows):
        return cast(list[Item], rows)
    raise AdarankTypeError(
        "data must be a file, texts, (text, label) pairs, read_data's or dicts with labels, got "
        + (f"items like {rows[0]!r:.60}" if rows else "none")
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, data: Data, classes: list[str], max_length: int
) -> list[Item]:
    if data.labels is not None:
        return encode_labelled(tokenizer, data.texts, data.labels, classes, max_length)
    if data.form == "text":
        return encode_blocks(tokenizer, data.texts, max_length)
    return tokenise(data.rows, tokenizer, {"max_length": max_length})


def _describe_items(items: Sequence[Item], task: str) -> tuple[str, list[str]]:
    """Task and names of classes of tokenised items."""
    language = isinstance(items[0]["labels"], (list, tuple))
    if task == "auto":
        task = "causal-lm" if language else "classification"
    if language != (task == "causal-lm"):
        raise AdarankError(f"task={task!r} does not go with labels like {items[0]['labels']!r:.40}")
    names = [] if language else [str(n) for n in range(max(item["labels"] for item in items) + 1)]
    return task, names


def calibration(experiment: Experiment, labels: bool = False) -> list[Batch]:
    """The first training items that make `CALIBRATION_TOKENS` tokens, with `labels` or without."""
    items: list[Item] = []
    tokens = 0
    for item in experiment.train[:CALIBRATION_ITEMS]:
        if tokens >= CALIBRATION_TOKENS:
            break
        items.append({key: value for key, value in item.items() if labels or key != "labels"})
        tokens += len(item.get("input_ids", ()))
    starts = range(0, len(items), CALIBRATION_BATCH)
    return [collate(items[i : i + CALIBRATION_BATCH], experiment.pad) for i in starts]


def split_validation(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """(to train on, to validate on): items of the same tokens stay together."""
    keys = [str(item.get("input_ids", item)) for item in items]
    unique = sorted(set(keys))
    random.Random(0).shuffle(unique)
    chosen = set(unique[: max(round(VALIDATION_SHARE * len(unique)), 1)])
    train = [item for item, key in zip(items, keys, strict=True) if key not in chosen]
    if not train:
        raise AdarankError(f"{len(items)} training items are too few to set some aside; give more")
    return train, [item for item, key in zip(items, keys, strict=True) if key in chosen]


def try_metric(metric: Metric, experiment: Experiment) -> float | None:
    """Try the metric before any training, on perfect and on random predictions.

    Returns:
        The second, to recognise the metric by; None: it has no value for these.

    Raises:
        AdarankError: it has none for perfect predictions.
    """
    labels = numpy.array([label for item in experiment.held_out for label in _flat(item["labels"])])
    classes = max(experiment.classes or 0, labels.max() + 1)
    random = numpy.random.RandomState(0)  # whose numbers stay the same from version to version
    if experiment.task == "classification":
        perfect = numpy.eye(classes, dtype=numpy.float32)[labels]
        guessed = random.standard_normal(perfect.shape).astype(numpy.float32)
    else:
        perfect, guessed = labels, random.randint(classes, size=labels.shape)
    counts = numpy.ones(len(labels))
    metric.value(Evaluation(0 * counts, counts, perfect, labels))
    try:
        return float(f"{metric.value(Evaluation(counts, counts, guessed, labels)):.6g}")
    except AdarankError:
        return None


def _flat(label: int | Sequence[int]) -> Sequence[int]:
    return [label] if isinstance(label, int) else [one for one in label[1:] if one != IGNORED]
