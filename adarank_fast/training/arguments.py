"""The fields of `TrainingArguments` and `SFTConfig`, from files and from text."""

from __future__ import annotations

import difflib
import json
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments

from adarank_fast.errors import AdarankError, AdarankFileNotFoundError, AdarankImportError
from adarank_fast.options import check_choice

COMMON = {
    "num_train_epochs": 3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,  # a share of the steps, as the two below
    "logging_steps": 0.025,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "weight_decay": 0.0,
    "report_to": "none",
    "seed": 0,
}
Fields = Mapping[str, Any]  # of `TrainingArguments` or `SFTConfig`
DEFAULTS: dict[str, Fields] = {
    "classification": {"per_device_train_batch_size": 32, "learning_rate": 1e-3},
    "causal-lm": {
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-4,
        "gradient_checkpointing": False,  # TRL has it on, and casts to bfloat16
        "bf16": False,
    },
}
FLAGS = {  # our own flags are names for these fields
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "learning_rate": "learning_rate",
    "max_length": "max_length",
    "seed": "seed",
}
OURS = {  # fields that the run sets itself
    "output_dir": "the adapter goes to --output-folder",
    "resume_from_checkpoint": "the same command continues an interrupted run",
    "restore_callback_states_from_checkpoint": "a continued run always keeps its callbacks' states",
    "save_only_model": "an interrupted run could then not be continued",
    "remove_unused_columns": "the columns are those that training needs",
    "eval_packing": "the metric is of whole examples",
    "eval_dataset": "give --eval-data",
    "push_to_hub": "upload the finished folder: hf upload NAME FOLDER",
    "model_init_kwargs": "give --dtype and --four-bit",
    "disable_tqdm": "the progress bar is on terminals only",
    "do_train": "train trains",
    "do_eval": "give --eval-data",
    "do_predict": "use adarank apply",
}


@dataclass
class ClassificationConfig(TrainingArguments):
    """`TrainingArguments`, and how long a text may be.

    Attributes:
        max_length: tokens of a text; longer ones are cut.
    """

    max_length: int = field(default=128)


@cache
def config_class(task: str) -> type[TrainingArguments]:
    """The dataclass whose fields training for a task takes.

    Raises:
        AdarankImportError: trl is needed and not there.
    """
    if task == "classification":
        return ClassificationConfig
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise AdarankImportError(
            f"training language models needs trl ({error}): pip install 'adarank-fast[trl]'"
        ) from error
    found: type[TrainingArguments] = SFTConfig
    return found


def read_settings(
    task: str,
    config: str | os.PathLike[str] | None = None,
    flags: Fields | None = None,
    pairs: Sequence[str] = (),
) -> dict[str, Any]:
    """Names and values of the fields that are not the libraries' defaults.

    A later source wins: our defaults, the file, the flags, the pairs. A flag and a pair for one
    field contradict each other.

    Args:
        task: see `config_class`.
        config: a YAML or JSON file of fields.
        flags: of `FLAGS`; None: not given.
        pairs: "name=value" each.

    Raises:
        AdarankError: an unknown field or a value that its field does not take; the nearest name or
            the types are in the message.
    """
    values = {**COMMON, **DEFAULTS[task]}
    if config is not None:
        values |= {
            name: _checked(task, name, value, f"{config}: ")
            for name, value in _read_config(Path(config)).items()
        }
    given = {FLAGS[flag]: value for flag, value in (flags or {}).items() if value is not None}
    values |= given
    flag_of = {name: flag.replace("_", "-") for flag, name in FLAGS.items()}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise AdarankError(f"--set {pair!r}: give name=value, such as --set warmup_steps=50")
        if name in given:
            raise AdarankError(f"--set {name}= and --{flag_of[name]} name one field; give one")
        values[name] = _checked(task, name, _parsed(text), "--set ", text)
    return values


def make_arguments(
    task: str, settings: Fields, folder: str | os.PathLike[str]
) -> TrainingArguments:
    """An object of the task's class.

    Args:
        task: "classification" or "causal-lm".
        settings: see `read_settings`.
        folder: for checkpoints and logs.

    Raises:
        AdarankError: the class refuses the values together, or one of them.
    """
    ours: dict[str, object] = {
        "output_dir": str(folder),
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }
    if task == "classification":
        ours |= {"remove_unused_columns": False, "label_names": ["labels"]}
    else:
        ours |= {"eval_packing": False}
    if not torch.cuda.is_available():
        ours |= {"use_cpu": True, "dataloader_pin_memory": False}
    try:
        return config_class(task)(**{**ours, **settings})
    except (ValueError, TypeError, ImportError) as error:
        raise AdarankError(f"{config_class(task).__name__} refuses the settings: {error}") from None


def _read_config(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise AdarankFileNotFoundError(f"--config: there is no file {str(path)!r}")
    check_choice("--config suffix", path.suffix.lower(), (".yaml", ".yml", ".json"))
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            found = json.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError) as error:
        raise AdarankError(f"--config {path}: {error}") from None
    except Exception as error:  # yaml's own errors
        raise AdarankError(f"--config {path}: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise AdarankError(f"--config {path}: must be names and values, such as 'warmup_steps: 50'")
    return found


def _parsed(text: str) -> object:
    """Text as YAML reads it: true, 3, 0.1, null, [a, b], {a: 1}; else as it is."""
    import yaml

    try:
        return yaml.safe_load(text) if text else text
    except yaml.YAMLError:
        return text


def _checked(task: str, name: str, value: object, where: str, text: str | None = None) -> object:
    """The value as the field's type, or an error that says what the field takes."""
    if name in OURS:
        raise AdarankError(f"{where}{name} cannot be set: {OURS[name]}")
    cls = config_class(task)
    hints = _hints(task)
    if name not in hints:
        near = difflib.get_close_matches(name, hints, 1)
        meant = f"did you mean {near[0]!r}?" if near else "see its documentation"
        raise AdarankError(f"{where}{name}: {cls.__name__} has no such field; {meant}")
    found = _as_type(hints[name], value, text)
    if found is _REFUSED:
        raise AdarankError(
            f"{where}{name} takes {_said(hints[name])}, got {value if text is None else text!r}"
        )
    return found


@cache
def _hints(task: str) -> dict[str, object]:
    cls = config_class(task)
    known = {one.name for one in fields(cls) if one.init}
    return {name: hint for name, hint in get_type_hints(cls).items() if name in known}


_REFUSED = object()


def _as_type(hint: object, value: Any, text: str | None) -> object:
    if get_origin(hint) in (Union, types.UnionType):
        parts = sorted(get_args(hint), key=lambda part: part is str)  # text is the last resort
        found = (_as_type(part, value, text) for part in parts)
        return next((one for one in found if one is not _REFUSED), _REFUSED)
    if hint is Any:
        return value
    if hint is type(None):
        return None if value is None else _REFUSED
    if get_origin(hint) is Literal:
        return value if value in get_args(hint) else _REFUSED
    kind = get_origin(hint) or hint
    if kind is str:
        said = value if text is None else text  # 'no' and '007' are text where text is wanted
        return said if isinstance(said, str) else _REFUSED
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-4 as text
        except (TypeError, ValueError, OverflowError):
            return _REFUSED
        if kind is float:
            return number
        return int(number) if number.is_integer() else _REFUSED
    if isinstance(kind, type) and isinstance(value, kind) and kind not in (int, float):
        return value
    return _REFUSED


def _said(hint: object) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in get_args(hint) if part is not type(None)]
        return " or ".join(dict.fromkeys(map(_said, parts)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    names: dict[object, str] = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
    }
    return names.get(hint) or str(getattr(hint, "__name__", hint))
