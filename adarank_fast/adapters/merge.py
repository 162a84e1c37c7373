"""Add an adapter to the weights of its base model: a plain model folder, tokenizer included."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from adarank_fast.adapters.adapter_files import PREFIX, Adapter, read_adapter
from adarank_fast.adapters.export import check_fits
from adarank_fast.adapters.patterns import check_patterns, keys_of_experts
from adarank_fast.adapters.peft_private import BaseTunerLayer
from adarank_fast.errors import AdarankError
from adarank_fast.files import new_folder
from adarank_fast.models.remote_code import is_trusted
from adarank_fast.models.text import first_line, loading

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
ModelClass = Any  # a class of transformers that loads models; its methods have no types


@contextmanager
def _without_expected_warnings() -> Iterator[None]:
    """Deprecations are not the user's; of tied weights `_untie` takes care."""
    tied = (".*`?tie_word_embeddings", "Input and output embeddings are no longer tied")
    with keys_of_experts(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for message in tied:
            warnings.filterwarnings("ignore", message=message)
        yield


def merge_adapter(
    model: str,
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    dtype: str = "auto",
) -> set[str]:
    """Write a model with an adapter merged into it, and its tokenizer.

    Args:
        model: folder or hub name of the base model.
        adapter: a folder that `PeftModel.save_pretrained` wrote.
        folder: a new or empty folder; written whole or not at all.
        dtype: of the merged weights; "auto" is the base model's own.

    Returns:
        Names of weights that neither the model nor the adapter has; they are random.

    Raises:
        AdarankError: the adapter does not fit the model, or one of them cannot be loaded or merged.
    """
    with new_folder(folder) as temporary, _without_expected_warnings():
        found = read_adapter(adapter, only_plain=False)
        skeleton, config = base_skeleton(found, model, "MODEL")
        if found.config.target_parameters:
            check_patterns(found.config, [path for path, _ in skeleton.named_modules() if path])
        else:
            check_fits(found, skeleton)
        if getattr(config, "quantization_config", None) is not None:
            raise AdarankError(
                f"MODEL {model!r} is quantised: merging would round the adapter away; give the "
                "unquantised model"
            )
        _name_classes(config, Path(adapter))
        merged, fresh = _merge(type(skeleton), model, config, adapter, found, dtype)
        merged.save_pretrained(temporary)
        _save_tokenizer([str(adapter), model], temporary)
    return fresh


@_without_expected_warnings()
def base_skeleton(
    adapter: Adapter, name: str | None, argument: str
) -> tuple[PreTrainedModel, PretrainedConfig]:
    """(the adapter's base model without weights, its configuration).

    The class is the one that has the adapter's modules: the one that the adapter names, that of its
    task, the bare model, or the checkpoint's own.

    Args:
        adapter: see `read_adapter`.
        name: folder or hub name of the base model; None: the one that the adapter names.
        argument: what the user gives another name with.

    Raises:
        AdarankError: the configuration cannot be loaded, or no class fits.
    """
    name = name or adapter.config.base_model_name_or_path
    if not name:
        raise AdarankError(f"the adapter does not say what its base model is; give {argument}")
    name = os.path.expanduser(name)
    with loading("configuration of the base model", name, f"; give {argument}"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=is_trusted())
    if labels := _label_count(adapter):
        config.num_labels = labels
    wanted = {path.replace(".base_layer", "") for path in adapter.factors}  # of experts
    for class_name in _class_names(adapter, config):
        skeleton = _without_weights(getattr(transformers, class_name, None), config)
        if skeleton is None:
            continue
        if wanted <= {path for path, _ in skeleton.named_modules()}:
            return skeleton, config
    raise AdarankError(
        f"the adapter does not fit {name!r} ({config.model_type}): no model of it has a module "
        f"{min(wanted)}"
    )


def _without_weights(model_class: ModelClass, config: PretrainedConfig) -> PreTrainedModel | None:
    """A model on the meta device; None where the class is no model's, or the model is not of it."""
    try:
        with torch.device("meta"):
            if hasattr(model_class, "from_config"):  # of the Auto classes
                made: PreTrainedModel = model_class.from_config(
                    config, trust_remote_code=is_trusted()
                )
                return made
            if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
                return model_class(config)
    except Exception:  # whatever a configuration of somebody else's makes of a model's own code
        return None
    return None


def _class_names(adapter: Adapter, config: PretrainedConfig) -> Iterator[str]:
    mapping = adapter.config.auto_mapping or {}
    if str(mapping.get("parent_library", "")).startswith("transformers."):
        yield str(mapping.get("base_model_class"))
    task = getattr(adapter.config.task_type, "value", adapter.config.task_type)
    if task in TASK_CLASSES:
        yield TASK_CLASSES[task]
    yield "AutoModel"
    yield from map(str, getattr(config, "architectures", None) or [])


def _label_count(adapter: Adapter) -> int | None:
    """How many classes the head has that the adapter brings along, if it does."""
    heads = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
    sizes = [t.shape[0] for name, t in adapter.others.items() if name.endswith(heads)]
    return sizes[-1] if sizes else None


def _name_classes(config: PretrainedConfig, folder: Path) -> None:
    """Give a configuration the names of classes, and the padding, of the one beside an adapter."""
    try:
        beside = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = {int(number): str(name) for number, name in beside["id2label"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # an adapter has no configuration of the model but where we or the user put one
    if sorted(names) == list(range(config.num_labels or 0)):
        config.id2label = names
        config.label2id = {name: number for number, name in names.items()}
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = beside.get("pad_token_id")


def _merge(
    model_class: ModelClass,
    name: str,
    config: PretrainedConfig,
    folder: str | os.PathLike[str],
    adapter: Adapter,
    dtype: str,
) -> tuple[PreTrainedModel, set[str]]:
    """(the merged model, names of weights that neither model nor adapter has)."""
    failed = f"cannot merge {str(folder)!r} into {name!r}"
    try:
        base, info = model_class.from_pretrained(
            os.path.expanduser(name),
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head of other size: the adapter has its own
        )
        _resize_vocabulary(base, adapter)
        peft_model = PeftModel.from_pretrained(base, folder)
    except Exception as error:
        raise AdarankError(f"{failed}: {first_line(error)}") from error
    tied = _tied_ends(base) is not None
    _untie(base)
    try:
        merged = peft_model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:  # NaN, say, or an adapter that cannot be merged
        raise AdarankError(f"{failed}: {first_line(error)}") from error
    if tied:
        _say_untied(merged)
    fresh = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    return merged, fresh - {key.removeprefix(PREFIX) for key in adapter.others}


def _resize_vocabulary(base: PreTrainedModel, adapter: Adapter) -> None:
    """Make room for the tokens that were added before training: the adapter has their embedding."""
    end = base.get_input_embeddings()
    path = next((path for path, module in base.named_modules() if module is end), "")
    for name in (f"{PREFIX}{path}.weight", f"{PREFIX}{path}.base_layer.weight"):
        if name in adapter.others and len(adapter.others[name]) != len(cast(Tensor, end.weight)):
            base.resize_token_embeddings(len(adapter.others[name]), mean_resizing=False)


def _tied_ends(model: PreTrainedModel) -> tuple[nn.Module, nn.Module] | None:
    """(head, embedding) of a model that ties them."""
    head = model.get_output_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return None
    return head, model.get_input_embeddings()


def _untie(model: PreTrainedModel) -> None:
    """Give an adapted head its own copy of a weight shared with the embedding, or the reverse.

    What is merged into one must not change the other, see
    https://github.com/huggingface/peft/issues/2018.
    """
    ends = _tied_ends(model)
    if ends is None or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    head, embedding = (_inside(e) for e in ends)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(cast(Tensor, head.weight).detach().clone(), requires_grad=False)


def _inside(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, BaseTunerLayer):
        return layer
    return layer.get_base_layer()


def _say_untied(model: PreTrainedModel) -> None:
    """Loading would tie a head to the embedding again that is another tensor now."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if torch.equal(cast(Tensor, head.weight), cast(Tensor, embedding.weight)):
        return
    if getattr(model.config, "is_encoder_decoder", False):  # T5 then leaves a scaling out
        raise AdarankError(
            "the adapter changes the head or the embedding, which share a weight, and "
            f"{type(model).__name__} cannot save them apart; to merge, train without them "
            "(target_modules)"
        )
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def _save_tokenizer(folders: list[str], target: Path) -> None:
    """That of the first that has one; a model may also have none."""
    for folder in folders:
        if os.path.isdir(folder) and not any(Path(folder).glob("*token*")):
            continue
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=is_trusted()
            )
            tokenizer.save_pretrained(target)
            return
        except (OSError, ValueError, KeyError):
            continue
        except Exception as error:  # of the library in Rust
            raise AdarankError(
                f"the tokenizer of {folder!r} cannot be loaded: {first_line(error)}; replace its "
                "files or remove them"
            ) from error
