"""A saved LoRA adapter: its configuration and tensors, read from a folder and found to agree."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from adarank_fast.adapters.patterns import check_patterns
from adarank_fast.adapters.peft_private import pattern_value
from adarank_fast.errors import AdarankError
from adarank_fast.json_values import MOST, Value, said
from adarank_fast.models.text import first_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor in an adapter file

# An adapter with one of these computes something that A and B alone cannot express.
UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "target_parameters": "parameters that belong to no module (experts)",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained tokens",
    "alora_invocation_tokens": "an invocation of its own (aLoRA)",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "QALoRA",
}

PLAIN_INITS = ("gaussian", "eva", "orthogonal")  # others change the base model's weights


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BIASES = ("none", "all", "lora_only")
REMEDY = "save the adapter again with save_pretrained"

TEXTS = ("peft_version", "revision", "megatron_core", "task_type", "base_model_name_or_path")
SWITCHES = (
    "inference_mode",
    "fan_in_fan_out",
    "use_rslora",
    "use_dora",
    "use_qalora",
    "lora_bias",
    "ensure_weight_tying",
)
NAMES = ("modules_to_save", "target_parameters")  # null, or a list of names
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")  # or one text


@dataclass
class Adapter:
    """An adapter's tensors and what they mean; names are module paths in the base model.

    Attributes:
        config: PEFT's.
        factors: path -> (A [r, in], B [out, r]).
        scales: path -> what B A is multiplied with.
        others: whole modules (`modules_to_save`), by their name in the adapter file.
    """

    config: LoraConfig
    factors: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    others: dict[str, Tensor]


def read_adapter(folder: str | os.PathLike[str], only_plain: bool = True) -> Adapter:
    """The adapter in a folder, after its two files were found to agree.

    Args:
        folder: what `PeftModel.save_pretrained` wrote.
        only_plain: refuse what A, B and a scale cannot express, such as DoRA.

    Raises:
        AdarankError: it is no folder of a LoRA adapter, or a file is damaged, or they disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdarankError(f"adapter {str(folder)!r} is not a folder")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            within = next(
                (f"; {str(f.parent)!r} has one" for f in sorted(folder.glob(f"*/{name}"))), ""
            )
            raise AdarankError(
                f"{str(folder)!r} is not an adapter folder: it has no {name}, which "
                f"save_pretrained of a PEFT model writes{within}"
            )
    config = _read_config(folder)
    if only_plain:
        refuse_unsupported(config)
    try:
        state = load_file(folder / WEIGHTS)
    except Exception as error:  # the library's own errors, and Python's where a header lies
        reason = first_line(error)
        raise AdarankError(
            f"{WEIGHTS} in {str(folder)!r} cannot be read: {reason}; {REMEDY}"
        ) from error
    factors, others = split(state, only_plain)
    check_tensors({f"{path}.lora_A": lora_A for path, (lora_A, _) in factors.items()})
    check_tensors({f"{path}.lora_B": lora_B for path, (_, lora_B) in factors.items()})
    check_tensors(others, floating=False)
    check_patterns(config, sorted(factors))
    scales = {}
    for path, (lora_A, _) in factors.items():
        rank, scales[path] = _configured(config, path)
        if lora_A.shape[0] != rank and not config.target_parameters:  # theirs: rank x experts
            raise AdarankError(
                f"{CONFIG} and {WEIGHTS} disagree: {path} has rank {lora_A.shape[0]}, the "
                f"configuration says {rank}; they are not of one adapter"
            )
    return Adapter(config, factors, scales, others)


def check_tensors(tensors: Mapping[str, Tensor], floating: bool = True) -> None:
    """Refuse tensors that are not finite, or of a type that LoRA has not.

    Raises:
        AdarankError: which tensor it is.
    """
    for name, tensor in tensors.items():
        if floating and tensor.dtype not in DTYPES:
            raise AdarankError(
                f"the adapter's tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, not "
                f"floating point; {REMEDY}"
            )
        if tensor.dtype in DTYPES and not bool(torch.isfinite(tensor).all()):
            raise AdarankError(
                f"the adapter's tensor {name} has NaN or infinite values; train it again, with a "
                "lower learning rate"
            )


def _read_config(folder: Path) -> LoraConfig:
    """The configuration, after the types and ranges of what PEFT computes with were checked."""
    content = Value.read(folder / CONFIG, "adapter configuration", REMEDY)
    kind = content["peft_type"].text()
    if kind != "LORA":
        raise AdarankError(f"the adapter in {str(folder)!r} is {kind}, not LoRA")
    _check_config(content)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT's own check of a field, of any type
        raise AdarankError(
            f"{CONFIG} in {str(folder)!r} cannot be read: {first_line(error)}; {REMEDY}"
        ) from error
    if not isinstance(config, LoraConfig):
        raise AdarankError(f"the adapter in {str(folder)!r} is {kind}, not LoRA")
    return config


def _check_config(content: Value) -> None:
    for field in TEXTS:
        if text := content.get(field):
            text.text()
    for field in SWITCHES:
        if switch := content.get(field):
            switch.truth()
    for field in NAMES + PATTERNS:
        if names := content.get(field):
            alone = field in PATTERNS and isinstance(names.value, str)
            for name in () if alone else names.list():
                name.text()
    if "r" in content.mapping():
        content["r"].integer(1)
    if "lora_alpha" in content.mapping():
        content["lora_alpha"].number(-MOST, MOST)
    if dropout := content.get("lora_dropout"):
        dropout.number(0, 1)
    if bias := content.get("bias"):
        bias.one_of(BIASES)
    if "rank_pattern" in content.mapping():
        for _, rank in content["rank_pattern"].items():
            rank.integer(1)
    if "alpha_pattern" in content.mapping():
        for _, alpha in content["alpha_pattern"].items():
            alpha.number(-MOST, MOST)
    if not (content.get("target_modules") or content.get("target_parameters")):
        raise content["target_modules"].damaged("null, no names")
    if (init := content.get("init_lora_weights")) and not isinstance(init.value, bool):
        init.text()
    if layers := content.get("layers_to_transform"):
        for layer in layers.list() if isinstance(layers.value, list) else [layers]:
            layer.integer()
    if tokens := content.get("trainable_token_indices"):
        lists = [one for _, one in tokens.items()] if isinstance(tokens.value, dict) else [tokens]
        for token in (token for one in lists for token in one.list()):
            token.integer()
    if mapping := content.get("auto_mapping"):
        for _, name in mapping.items():
            if name.value is not None:
                name.text()
    if megatron := content.get("megatron_config"):  # PEFT imports whatever megatron_core names
        raise megatron.damaged(f"{said(megatron.value)}; adapters of Megatron are not read")


def refuse_unsupported(config: LoraConfig) -> None:
    """Refuse what A, B and a scale cannot express, such as DoRA.

    Raises:
        AdarankError: what it is.
    """
    found = [what for field, what in UNSUPPORTED.items() if getattr(config, field, None)]
    if config.bias != "none":
        found.append(f"trained biases (bias={config.bias!r})")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        found.append(f"a base model changed by init_lora_weights={init!r}")
    if found:
        raise AdarankError(
            f"the adapter has {found[0]}, which a plain LoRA adapter cannot express; merge it into "
            "the model instead (adarank merge)"
        )


def split(
    state: Mapping[str, Tensor], only_plain: bool = True
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """(path -> (A, B), the tensors of whole modules)."""
    halves: dict[str, dict[str, Tensor]] = {}
    others = {}
    for name, tensor in state.items():
        path, _, half = name.removesuffix(".weight").rpartition(".")
        if half in ("lora_A", "lora_B") and tensor.ndim == 2:
            halves.setdefault(path.removeprefix(PREFIX), {})[half] = tensor
        elif "lora_" in name and only_plain:
            raise AdarankError(
                f"the adapter's tensor {name} is not that of a linear layer; engines do not load it"
            )
        else:
            others[name] = tensor
    if not halves:
        raise AdarankError("the adapter has no lora_A and lora_B tensors")
    factors = {}
    for path, pair in halves.items():
        if len(pair) < 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise AdarankError(f"the adapter's lora_A and lora_B of {path} do not belong together")
        factors[path] = (pair["lora_A"], pair["lora_B"])
    return factors, others


def _configured(config: LoraConfig, path: str) -> tuple[int, float]:
    """(rank, scale) of a module, as PEFT reads them."""
    rank = int(pattern_value(config.rank_pattern, path, config.r))
    alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)
