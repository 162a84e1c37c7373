"""Models for a task from a folder or a hub name, and what of them no checkpoint has trained."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adarank_fast.models.outputs import mean_pool
from adarank_fast.training.data import TextData
from adarank_fast.training.tokens import pad_id

TASKS = ("classification", "causal-lm")


DTYPES = ("float32", "bfloat16", "float16")


PEFT_SAVES = ("classifier", "score")  # heads that PEFT trains along of itself, given SEQ_CLS


class MeanPoolClassifier(nn.Module):
    """An encoder, its last hidden state averaged over unmasked positions, and a linear head."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(mean_pool(hidden, attention_mask).to(self.head.weight.dtype))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or a hub name.

    Raises:
        ValueError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with _loading("tokenizer", name):
        return AutoTokenizer.from_pretrained(name)


def load_model(
    name: str,
    task: str,
    classes: Sequence[str] = (),
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    four_bit: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """transformers' own model for the task, ready for adapters.

    Args:
        name: a folder or a hub name.
        task: "classification" (a new head where the checkpoint has none, drawn from torch's
            generator) or "causal-lm".
        classes: names of the classes.
        tokenizer: tells the model what padding is.
        dtype: of the weights.
        four_bit: quantise the frozen weights to 4 bits (bitsandbytes, nf4).

    Returns:
        The model, and the `LoraConfig` arguments it needs: task_type, and modules_to_save for
        modules that the checkpoint does not have and that PEFT would leave untrained.

    Raises:
        ValueError: the model cannot be loaded.
        ImportError: `four_bit` without bitsandbytes.
    """
    import transformers

    check_choice("task", task, TASKS)
    check_choice("dtype", dtype, DTYPES)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    if four_bit:
        options["quantization_config"] = _four_bit(getattr(torch, dtype))
    if task == "classification":
        numbers = {label: number for number, label in enumerate(classes)}
        options["id2label"] = {number: label for label, number in numbers.items()}
        options["label2id"] = numbers
        options["num_labels"] = len(numbers)
        kind: Any = transformers.AutoModelForSequenceClassification
    else:
        kind = transformers.AutoModelForCausalLM
    with _loading("model", name):
        model, report = kind.from_pretrained(name, **options)
    if tokenizer is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id(tokenizer)
    if four_bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if task == "causal-lm":
        return model, {"task_type": "CAUSAL_LM"}
    new = sorted({key.rpartition(".")[0] for key in report["missing_keys"]})
    extra = [path for path in new if path.split(".")[0] not in PEFT_SAVES]
    return model, {"task_type": "SEQ_CLS", "modules_to_save": extra or None}


def model_factory(
    name: str, task: str, classes: Sequence[str], tokenizer: Any, dtype: str
) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    """A function that makes the untrained model of the task again and again.

    Encoders are read once, and get mean pooling and a new linear head: many a checkpoint's pooler
    is untrained. Other models are those of `load_model`.

    Returns:
        The function, which draws the head from torch's generator; and `LoraConfig` arguments.
    """
    from transformers import AutoConfig, AutoModel

    check_choice("task", task, TASKS)
    check_choice("dtype", dtype, DTYPES)
    with _loading("config", name):
        config = AutoConfig.from_pretrained(name)
    if task == "classification" and not _generates(config):
        with _loading("weights", name):
            encoder = AutoModel.from_pretrained(name, dtype=getattr(torch, dtype))
        count = len(classes)
        return lambda: MeanPoolClassifier(copy.deepcopy(encoder), count), {
            "modules_to_save": ["head"]
        }
    model, extra = load_model(name, task, classes, tokenizer=tokenizer, dtype=dtype)
    if task == "causal-lm":
        return lambda: copy.deepcopy(model), extra
    return lambda: load_model(name, task, classes, tokenizer=tokenizer, dtype=dtype)[0], extra


def _generates(config: Any) -> bool:
    """Whether the checkpoint is that of a language model that writes text."""
    names = getattr(config, "architectures", None) or [""]
    return names[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def _four_bit(dtype: torch.dtype) -> Any:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("a 4-bit base needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["classifier", "score", "lm_head", "pooler"],
    )


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """A ValueError of one line unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{argument}={value!r} is unknown; use one of {', '.join(choices)}")


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Whatever goes wrong in loading files that somebody else made is bad input."""
    try:
        yield
    except Exception as error:
        where = "folder" if os.path.isdir(name) else "no such folder, so a hub name"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load the {what} of model {name!r} ({where}): {reason}") from error


def settle_task(task: str, data: TextData) -> str:
    """What "auto" means: classification where there are labels, else causal-lm.

    Raises:
        ValueError: an unknown task.
    """
    check_choice("task", task, ("auto", *TASKS))
    if task != "auto":
        return task
    return "causal-lm" if data.labels is None else "classification"
