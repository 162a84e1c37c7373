"""Models and tokenizers from a folder or a hub name: to predict on, and to train for a task."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from adarank_fast.errors import AdarankError, AdarankImportError
from adarank_fast.models.outputs import mean_pool
from adarank_fast.models.remote_code import is_trusted
from adarank_fast.models.text import first_line, loading
from adarank_fast.options import DTYPES, TASKS, check_choice, check_number
from adarank_fast.training.tokens import add_decoder_inputs, make_batches, pad_id

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from adarank_fast.models.batches import Batch

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
LoraOptions = dict[str, Any]  # arguments of `LoraConfig`
PEFT_SAVES = (
    "classifier",
    "score",
)  # heads that PEFT trains without being asked, for task type SEQ_CLS


class MeanPoolClassifier(nn.Module):
    """An encoder, its last hidden state averaged over unmasked positions, and a linear head."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: PreTrainedModel, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits [B, classes] for token ids and mask, [B, T]; also the mean loss for labels [B]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(mean_pool(hidden, attention_mask).to(self.head.weight.dtype))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a hub name.

    Raises:
        AdarankError: it cannot be loaded.
    """
    with loading("tokenizer of model", name):
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=is_trusted())


def load_pretrained(
    name: str, device: str | None = None, dtype: str = "float32", threads: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or a hub name, in eval mode.

    Args:
        name: what is not there as a folder, and does not look like one, is a hub name.
        device: None: a GPU if there is one.
        dtype: one of `DTYPES`, or "auto": the checkpoint's own.
        threads: CPU threads; None leaves them.

    Raises:
        AdarankError: it cannot be loaded.
    """
    if os.path.exists(name) or name.startswith((".", "/", "~")):
        name = os.path.expanduser(name)
        if not os.path.isdir(name):
            raise AdarankError(f"MODEL {name!r} is not a folder; give the folder of a saved model")
        if not os.path.exists(os.path.join(name, "config.json")):
            raise AdarankError(
                f"MODEL folder {name!r} has no config.json; save_pretrained makes one"
            )
    if threads is not None:
        check_number("threads", threads)
        torch.set_num_threads(threads)
    config = load_config(name)
    tokenizer = load_tokenizer(name)
    with loading("weights of model", name):
        model = getattr(transformers, auto_class(config)).from_pretrained(
            name, dtype=dtype, trust_remote_code=is_trusted()
        )
    if not getattr(model, "is_quantized", False):
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # torchrun's
        device = device or (gpu if torch.cuda.is_available() else "cpu")
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise AdarankError(
                f"--device {device!r} cannot be used: {first_line(error)}"
            ) from error
    return model.eval(), tokenizer


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a folder or a hub name.

    Raises:
        AdarankError: it cannot be loaded.
    """
    with loading("config of model", name):
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(
            name, trust_remote_code=is_trusted()
        )
    return config


def auto_class(config: PretrainedConfig) -> str:
    """The transformers class to load with: language models with their head, others without."""
    architectures = getattr(config, "architectures", None) or []
    if not any(name.endswith(LANGUAGE_MODELS) for name in architectures):
        return "AutoModel"
    if getattr(config, "is_encoder_decoder", False):
        return "AutoModelForSeq2SeqLM"
    if architectures[0].endswith("ForConditionalGeneration"):  # text and images
        return "AutoModelForImageTextToText"
    return "AutoModelForCausalLM"


def check_task(name: str, task: str) -> None:
    """Refuse a model that cannot be trained for a task, by its configuration.

    Raises:
        AdarankError: a language model is wanted of an encoder, or of an encoder with a decoder; or
            the configuration cannot be loaded.
    """
    config = load_config(name)
    kind, made = auto_class(config), ", ".join(getattr(config, "architectures", None) or ["?"])
    if task == "classification" or kind == "AutoModelForCausalLM":
        return
    if kind == "AutoModel":
        raise AdarankError(
            f"MODEL {name!r} ({made}) has no language-model head, which causal-lm (the task of "
            "texts without labels) needs; for classification name the column of labels "
            "(--label-column), or take a language model"
        )
    raise AdarankError(
        f"MODEL {name!r} ({made}) is not a decoder-only model; train it with its own "
        "script and ada.inject"
    )


def calibration_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int,
    max_length: int,
    special_tokens: bool = True,
) -> list[Batch]:
    """Batches on the model's device; with inputs for the decoder if there is one."""
    batches = make_batches(tokenizer, texts, batch_size, max_length, special_tokens)
    if getattr(model.config, "is_encoder_decoder", False):
        start = getattr(model.config, "decoder_start_token_id", None)
        batches = add_decoder_inputs(batches, pad_id(tokenizer) if start is None else start)
    return [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]


def load_model(
    name: str,
    task: str,
    classes: Sequence[str] = (),
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "float32",
    four_bit: bool = False,
) -> tuple[PreTrainedModel, LoraOptions]:
    """The model class of transformers for the task, ready for adapters.

    Args:
        name: a folder or a hub name.
        task: "classification" (a new head, drawn from torch's generator, where the checkpoint has
            none for as many classes) or "causal-lm".
        classes: names of the classes.
        tokenizer: tells the model what padding is.
        dtype: of the weights.
        four_bit: quantise the frozen weights to 4 bits (bitsandbytes, nf4).

    Returns:
        The model, and the `LoraConfig` arguments it needs: task_type, and modules_to_save for
        modules that the checkpoint does not have and that PEFT would leave untrained.

    Raises:
        AdarankError: the model cannot be loaded.
        AdarankImportError: `four_bit` without bitsandbytes.
    """
    check_choice("task", task, TASKS)
    check_choice("dtype", dtype, DTYPES)
    options: dict[str, object] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    if four_bit:
        options["quantization_config"] = four_bit_config(getattr(torch, dtype))
    if task == "classification":
        numbers = {label: number for number, label in enumerate(classes)}
        options["id2label"] = {number: label for label, number in numbers.items()}
        options["label2id"] = numbers
        options["num_labels"] = len(numbers)
        options["problem_type"] = "single_label_classification"
        options["ignore_mismatched_sizes"] = (
            True  # a head for another number of classes is replaced by a new one
        )
        kind: Any = transformers.AutoModelForSequenceClassification
    else:
        kind = transformers.AutoModelForCausalLM
    with loading("model", name):
        model, report = kind.from_pretrained(name, trust_remote_code=is_trusted(), **options)
    if tokenizer is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id(tokenizer)
    if four_bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if task == "causal-lm":
        return model, {"task_type": "CAUSAL_LM"}
    keys = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    new = sorted({key.rpartition(".")[0] for key in keys})
    extra = [path for path in new if path.split(".")[0] not in PEFT_SAVES]
    return model, {"task_type": "SEQ_CLS", "modules_to_save": extra or None}


def model_factory(
    name: str,
    task: str,
    classes: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
) -> tuple[Callable[[], nn.Module], LoraOptions]:
    """A function that makes the untrained model of the task again and again.

    Encoders are read once, and get mean pooling and a new linear head, since the poolers of many
    checkpoints are untrained. Other models are those of `load_model`.

    Returns:
        The function, which draws the head from torch's generator; and `LoraConfig` arguments.
    """
    check_choice("task", task, TASKS)
    check_choice("dtype", dtype, DTYPES)
    if task == "classification" and auto_class(load_config(name)) == "AutoModel":
        with loading("weights of model", name):
            encoder = transformers.AutoModel.from_pretrained(
                name, dtype=getattr(torch, dtype), trust_remote_code=is_trusted()
            )
        count = len(classes)
        return lambda: MeanPoolClassifier(copy.deepcopy(encoder), count), {
            "modules_to_save": ["head"]
        }
    model, extra = load_model(name, task, classes, tokenizer=tokenizer, dtype=dtype)
    if task == "causal-lm":
        return lambda: copy.deepcopy(model), extra
    return lambda: load_model(name, task, classes, tokenizer=tokenizer, dtype=dtype)[0], extra


def has_other_head(name: str, task: str, classes: Sequence[str]) -> bool:
    """Whether a checkpoint has a classifier for another number of classes."""
    config = load_config(name)
    trained = any("SequenceClassification" in one for one in config.architectures or [])
    return task == "classification" and trained and config.num_labels != len(classes)


def four_bit_config(dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    """Settings for frozen weights in 4 bits (nf4), computed in `dtype`; heads stay as they are.

    Raises:
        AdarankImportError: bitsandbytes is not there.
    """
    if find_spec("bitsandbytes") is None:
        raise AdarankImportError("a 4-bit base needs bitsandbytes: pip install bitsandbytes")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["classifier", "score", "lm_head", "pooler"],
    )
