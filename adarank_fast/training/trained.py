"""Use a trained adapter: metrics on data, predictions for texts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn

from adarank_fast.adapters.accelerate import accelerate
from adarank_fast.adapters.patterns import keys_of_experts
from adarank_fast.errors import AdarankError
from adarank_fast.models.deprecations import without_deprecations
from adarank_fast.models.quantization import keep_unpacked
from adarank_fast.models.remote_code import is_trusted
from adarank_fast.models.text import first_line, list_names, loading
from adarank_fast.options import DTYPES, check_choice, check_integer
from adarank_fast.training import language_model
from adarank_fast.training.card import GENERATED, read_record
from adarank_fast.training.data import Data, read_data
from adarank_fast.training.data_files import quote
from adarank_fast.training.evaluation import evaluate as evaluate_items
from adarank_fast.training.evaluation import metrics
from adarank_fast.training.loading import LANGUAGE_MODELS, four_bit_config, load_config
from adarank_fast.training.tokens import Item, encode_labelled, make_batches, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adarank_fast.training.arguments import Fields

LENGTHS = {"classification": 128, "causal-lm": 1024}  # where the adapter does not say


@dataclass
class Trained:
    """A model with its adapter, ready for use.

    Attributes:
        model: with the adapter, in eval mode; or a merged one.
        tokenizer: the adapter's, or the model's where the adapter has none.
        task: "classification" or "causal-lm".
        classes: their names, by number; empty for language models.
        settings: fields of the training arguments that the adapter was trained with, if known.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: str
    classes: Sequence[str]
    settings: Fields

    @property
    def max_length(self) -> int:
        """Tokens of an example, as in training; a default of the task's where that is not known."""
        length = self.settings.get("max_length")
        return length if isinstance(length, int) and length > 0 else LENGTHS[self.task]


def load_trained(
    model: str,
    adapter: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    four_bit: bool = False,
    device: str | None = None,
    max_length: int | None = None,
) -> Trained:
    """A base model with an adapter that `adarank train`, or PEFT, saved; fused.

    Args:
        model: folder or hub name of the base model, or of a merged model.
        adapter: its folder; None: `model` is used as it is.
        dtype: of the base model's weights.
        four_bit: the base model in 4 bits.
        device: None: a GPU if there is one.
        max_length: tokens of an example; None: as in training.

    Raises:
        AdarankError: one of them cannot be loaded, or they do not fit each other.
    """
    from peft import PeftModel

    check_choice("dtype", dtype, DTYPES)
    task, config, tokens_from = task_of(model, adapter), load_config(model), model
    if adapter is not None:
        folder = Path(adapter)
        if (folder / "tokenizer_config.json").exists():
            tokens_from = str(adapter)
        if (folder / "config.json").exists():  # the base model's, with the classes
            config = load_config(str(adapter))
    options: dict[str, object] = {"dtype": getattr(torch, dtype)}
    if four_bit:
        options["quantization_config"] = four_bit_config(getattr(torch, dtype))
    if task == "classification":
        kind: Any = transformers.AutoModelForSequenceClassification
        options |= {"config": config, "ignore_mismatched_sizes": adapter is not None}
    else:
        kind = transformers.AutoModelForCausalLM
    with loading("tokenizer", tokens_from):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            tokens_from, trust_remote_code=is_trusted()
        )
    with loading("model", model):
        network = kind.from_pretrained(model, trust_remote_code=is_trusted(), **options)
    if adapter is not None:
        try:
            with keys_of_experts(), without_deprecations():
                network = PeftModel.from_pretrained(network, adapter)
        except Exception as error:  # sizes, names, damaged files
            raise AdarankError(
                f"adapter {str(adapter)!r} does not fit {model!r}: {first_line(error)}"
            ) from error
        accelerate(network)
    if four_bit:
        keep_unpacked(network)
    else:
        network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    classes = _classes(config) if task == "classification" else []
    noted = {} if adapter is None else read_record(adapter).get("settings")
    settings = dict(noted) if isinstance(noted, dict) else {}
    if max_length is not None:
        settings["max_length"] = max_length
    return Trained(network.eval(), tokenizer, task, classes, settings)


def evaluate(
    model: str | nn.Module,
    data: str | os.PathLike[str] | Data,
    adapter: str | os.PathLike[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    dtype: str = "float32",
    four_bit: bool = False,
) -> dict[str, float]:
    """Metrics of a trained model on data with labels, or of a language model on texts.

    Args:
        model: folder or hub name; or a model in memory, with its adapter if it has one.
        data: a file, see `read_data`, or what that returns.
        adapter: an adapter folder, for a `model` that is a name.
        tokenizer: for a model in memory.
        text_column: guessed if left out.
        label_column: guessed if left out.
        batch_size: examples a batch.
        max_length: tokens of an example; None: as in training.
        dtype: see `load_trained`.
        four_bit: see `load_trained`.

    Returns:
        See `evaluation.metrics`: accuracy, f1, loss and examples for classification; perplexity,
        loss, accuracy (of tokens) and tokens for a language model.

    Raises:
        AdarankError: what cannot be loaded or read; labels that the model has no class for.
    """
    check_integer("batch_size", batch_size, 1)
    if max_length is not None:
        check_integer("max_length", max_length, 1)

    def read(task: str) -> Data:
        return (
            data
            if isinstance(data, Data)
            else read_data(data, text_column=text_column, label_column=label_column, task=task)
        )

    if isinstance(model, str):
        found = read(task_of(model, adapter))  # refuses bad data before anything is loaded
        trained = load_trained(model, adapter, dtype, four_bit, max_length=max_length)
    elif adapter is not None:
        raise AdarankError("adapter= is for a model that is a name; this one is in memory")
    else:
        trained = _in_memory(model, tokenizer, max_length)
        found = read(trained.task)
    items = _items(trained, found, batch_size)
    modes = [(module, module.training) for module in trained.model.modules()]
    try:
        return metrics(evaluate_items(trained.model, *items))
    finally:
        for module, mode in modes:
            module.training = mode


def task_of(model: str, adapter: str | os.PathLike[str] | None) -> str:
    """What a model with its adapter is for, by their configurations.

    Raises:
        AdarankError: they do not say, or cannot be loaded.
    """
    from peft import PeftConfig

    if adapter is None:
        return _task(_architectures(model), None, model)
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise AdarankError(
            f"adapter {str(adapter)!r} is no adapter folder: it has no adapter_config.json"
        )
    with loading("configuration of the adapter", str(adapter)):
        task_type = PeftConfig.from_pretrained(os.fspath(adapter)).task_type
    return _task(_architectures(model), task_type, adapter)


def apply(
    trained: Trained,
    rows: Sequence[language_model.Row],
    batch_size: int = 32,
    max_new_tokens: int = GENERATED,
) -> Iterator[dict[str, object]]:
    """The trained model's prediction for each row, in their order.

    Args:
        trained: see `load_trained`.
        rows: in TRL's columns; labels and completions are not looked at.
        batch_size: rows a batch.
        max_new_tokens: of a generated text; the likeliest token each time.

    Yields:
        Classification: text, class (its name), number, probability. Language model: prompt (with
        the chat template), generated.
    """
    if trained.task == "classification" and not all("text" in row for row in rows):
        raise AdarankError("a classifier takes texts; the data are prompts or chats")
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        if trained.task == "classification":
            yield from _classify(trained, [str(row["text"]) for row in some])
        else:
            yield from _generate(trained, some, max_new_tokens)


def _classify(trained: Trained, texts: Sequence[str]) -> Iterator[dict[str, object]]:
    (batch,) = make_batches(trained.tokenizer, texts, len(texts), trained.max_length)
    device = next(trained.model.parameters()).device
    inputs = {k: v.to(device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        probabilities = trained.model(**inputs).logits.float().softmax(-1).cpu()
    for text, row in zip(texts, probabilities, strict=True):
        number = int(row.argmax())
        found = {"class": trained.classes[number], "number": number}
        yield {"text": text, **found, "probability": float(row[number])}


def _generate(
    trained: Trained, rows: Sequence[language_model.Row], max_new_tokens: int
) -> Iterator[dict[str, object]]:
    tokenizer = trained.tokenizer
    device = next(trained.model.parameters()).device
    for row in rows:  # one by one, so that no padding on the left is needed
        prompt = language_model.prompt_text(row, tokenizer)
        special = not language_model.is_chat(row)  # a template writes the first token itself
        ids = tokenizer(prompt, add_special_tokens=special)["input_ids"][-trained.max_length :]
        if not ids:
            raise AdarankError(f"the tokenizer makes no tokens of {quote(prompt)!r}; leave it out")
        inputs = torch.tensor([ids], device=device)
        with torch.inference_mode():
            output = cast(Any, trained.model).generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad_id(tokenizer),
            )
        answer = output[0, inputs.shape[1] :]
        yield {"prompt": prompt, "generated": tokenizer.decode(answer, skip_special_tokens=True)}


def _items(trained: Trained, data: Data, batch_size: int) -> tuple[list[Item], int, int]:
    """(items, the token to pad with, items a batch)."""
    pad = pad_id(trained.tokenizer)
    if trained.task == "classification":
        if data.labels is None:
            raise AdarankError("the data have no labels to compare with; name their column")
        if unknown := sorted(set(data.labels) - set(trained.classes)):
            raise AdarankError(
                f"the model has no class {quote(unknown[0])!r} ({len(unknown)} such labels); its "
                f"classes are {list_names(trained.classes)}"
            )
        texts = [str(row["text"]) for row in data.rows]
        labels, classes = list(data.labels), list(trained.classes)
        items = encode_labelled(trained.tokenizer, texts, labels, classes, trained.max_length)
        return items, pad, batch_size
    items = language_model.tokenise(data.rows, trained.tokenizer, trained.settings)
    return items, pad, language_model.batch_of(items, batch_size)


def _in_memory(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
) -> Trained:
    if tokenizer is None:
        raise AdarankError("a model in memory needs its tokenizer=")
    peft_config = getattr(model, "peft_config", {})
    task_type = next((one.task_type for one in peft_config.values()), None)
    kind = type(model).__name__
    task = _task([kind], task_type, kind)
    classes = _classes(model.config) if task == "classification" else []
    settings = {} if max_length is None else {"max_length": max_length}
    return Trained(model, tokenizer, task, classes, settings)


def _classes(config: object) -> list[str]:
    """Names of the classes, by their numbers."""
    names: Mapping[int, str] = getattr(config, "id2label", {})
    return [str(names[number]) for number in sorted(names)]


def _architectures(model: str) -> Sequence[str]:
    return getattr(load_config(model), "architectures", None) or []


def _task(architectures: Sequence[str], task_type: object, name: object) -> str:
    task_type = getattr(task_type, "value", task_type)
    if task_type is not None:
        tasks = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal-lm"}
        if task_type not in tasks:
            raise AdarankError(f"{str(name)!r} is for {task_type}; {' and '.join(tasks)} are known")
        return tasks[task_type]
    if any(one.endswith("ForSequenceClassification") for one in architectures):
        return "classification"
    if any(one.endswith(LANGUAGE_MODELS) for one in architectures):
        return "causal-lm"
    raise AdarankError(
        f"{str(name)!r} is neither a classifier nor a language model; give its adapter, or a model "
        "that is one"
    )
