"""Adapters for serving engines: one rank everywhere, each layer's scale folded into B.

Zero rows of A and zero columns of B change nothing, and (s B) A = s (B A): an adapter of mixed
ranks and scales becomes a plain one of rank R and scale 1 that computes the same function. Layers
without an adapter get one of zeros, so that every layer of a kind has one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adarank_fast.adapters.peft_private import BaseTunerLayer, is_target, pattern_value
from adarank_fast.errors import AdarankError
from adarank_fast.files import new_folder
from adarank_fast.models.targets import linear_shape
from adarank_fast.options import check_number

RANKS = (8, 16, 32, 64)  # what every engine's kernels take
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor in an adapter file

# An adapter with one of these computes something that A and B alone do not say.
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


def export_uniform(
    peft_model: nn.Module,
    folder: str | os.PathLike[str],
    rank: int | None = None,
    adapter_name: str = "default",
) -> int:
    """Save an adapter with one rank and scale 1 everywhere: the same function, served anywhere.

    Plain PEFT loads it too. It is for inference: the zeros of layers without an adapter have no
    gradient.

    Args:
        peft_model: a `peft.PeftModel` with LoRA adapters of any ranks and scales, fused or not.
        folder: a new or empty folder; written whole or not at all.
        rank: one of 8, 16, 32, 64; None: the smallest that holds the largest rank.
        adapter_name: PEFT's name for the adapter.

    Returns:
        The rank.

    Raises:
        AdarankError: `rank` is too small or none of those, `folder` is not empty, there is no such
            adapter, or it is of a kind that engines do not load (DoRA, biases, parameters).
    """
    check_rank(rank)
    with new_folder(folder) as temporary:
        return _write(from_model(peft_model, adapter_name), peft_model, temporary, rank)


def export_saved(
    adapter: Adapter,
    base_model: nn.Module,
    folder: str | os.PathLike[str],
    rank: int | None = None,
) -> int:
    """`export_uniform` for an adapter that `read_adapter` read.

    Args:
        adapter: what is in its folder.
        base_model: tells the layers' names and shapes; its weights are not used, so it may be on
            the meta device.
        folder, rank: see `export_uniform`.

    Raises:
        AdarankError: as `export_uniform`; or the adapter does not fit `base_model`.
    """
    check_rank(rank)
    with new_folder(folder) as temporary:
        check_fits(adapter, base_model)
        return _write(adapter, base_model, temporary, rank)


def check_rank(rank: int | None) -> None:
    """Refuse what engines do not take.

    Raises:
        AdarankError: none of `RANKS`.
    """
    if rank is not None and check_number("rank", rank) not in RANKS:
        raise AdarankError(f"rank={rank} is none of {', '.join(map(str, RANKS))}")


def from_model(peft_model: nn.Module, adapter_name: str = "default") -> Adapter:
    """The adapter of a live model, with the scales that are in force.

    Raises:
        AdarankError: it has no such LoRA adapter.
    """
    configs: Mapping[str, Any] = getattr(peft_model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, LoraConfig):
        there = ", ".join(configs) or "none"
        raise AdarankError(f"{adapter_name!r} is no LoRA adapter of the model; it has: {there}")
    _refuse_unsupported(config)
    state = get_peft_model_state_dict(
        peft_model, adapter_name=adapter_name, save_embedding_layers=False
    )
    factors, others = _split(state)
    base = cast(Any, peft_model).get_base_model()
    if config.task_type is None and config.auto_mapping is None:  # as save_pretrained does
        mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
        config = replace(config, auto_mapping=mapping)
    scales = {
        path: layer.scaling[adapter_name]
        for path, layer in base.named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter_name in getattr(layer, "scaling", {})
    }
    return Adapter(config, factors, scales, others)


def read_adapter(folder: str | os.PathLike[str], only_plain: bool = True) -> Adapter:
    """The adapter in a folder, after its two files were found to agree.

    Args:
        folder: what `PeftModel.save_pretrained` wrote.
        only_plain: refuse what A, B and a scale do not say, such as DoRA.

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
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:
        raise AdarankError(f"{CONFIG} in {str(folder)!r} cannot be read: {error}") from error
    if not isinstance(config, LoraConfig):
        raise AdarankError(f"the adapter in {str(folder)!r} is {config.peft_type.value}, not LoRA")
    if only_plain:
        _refuse_unsupported(config)
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise AdarankError(f"{WEIGHTS} in {str(folder)!r} cannot be read: {error}") from error
    factors, others = _split(state, only_plain)
    scales = {}
    for path, (lora_A, _) in factors.items():
        rank, scales[path] = _configured(config, path)
        if lora_A.shape[0] != rank and not config.target_parameters:  # theirs: rank x experts
            raise AdarankError(
                f"{CONFIG} and {WEIGHTS} disagree: {path} has rank {lora_A.shape[0]}, the "
                f"configuration says {rank}; they are not of one adapter"
            )
    return Adapter(config, factors, scales, others)


def check_fits(adapter: Adapter, base_model: nn.Module) -> None:
    """The adapter has tensors for exactly the modules that its configuration chooses.

    Raises:
        AdarankError: which module is too many or missing.
    """
    shapes = _module_shapes(base_model, adapter.config)
    chosen = {
        path
        for path, shape in shapes.items()
        if shape is not None and is_target(adapter.config, path)
    }
    kind = type(base_model).__name__
    if odd := sorted(adapter.factors.keys() - chosen):
        what = "is no target of its configuration" if odd[0] in shapes else f"is not in {kind}"
        raise AdarankError(f"the adapter has tensors for {odd[0]}, which {what}")
    if odd := sorted(chosen - adapter.factors.keys()):
        raise AdarankError(
            f"{CONFIG} and {WEIGHTS} disagree: {odd[0]} of {kind} is a target of the "
            "configuration but has no tensors"
        )


def _write(adapter: Adapter, model: nn.Module, folder: Path, rank: int | None) -> int:
    rank = _common_rank(adapter, rank)
    shapes = _module_shapes(model, adapter.config)
    for path in adapter.factors:
        if shapes.get(path) is None:
            raise AdarankError(f"{path} is not a linear layer; engines do not load its adapter")
    tensors = dict(adapter.others)
    names, paths = _targets(shapes, adapter.factors.keys())
    dtype = next(iter(adapter.factors.values()))[0].dtype
    for path in paths:
        shape = shapes[path]
        assert shape is not None
        fan_in, fan_out = shape
        padded_A = torch.zeros(rank, fan_in, dtype=dtype)
        padded_B = torch.zeros(fan_out, rank, dtype=dtype)
        if path in adapter.factors:
            lora_A, lora_B = adapter.factors[path]
            if lora_A.shape[1] != fan_in or lora_B.shape[0] != fan_out:
                raise AdarankError(
                    f"the adapter's {path} is {lora_A.shape[1]} x {lora_B.shape[0]} (in x out), "
                    f"the model's is {fan_in} x {fan_out}; it belongs to another model"
                )
            own = lora_A.shape[0]
            padded_A[:own] = lora_A
            padded_B[:, :own] = lora_B.float() * adapter.scales[path]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = padded_A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = padded_B
    config = replace(
        adapter.config,
        r=rank,
        lora_alpha=rank,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        target_modules=names,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_lora_weights=True,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    return rank


def _common_rank(adapter: Adapter, rank: int | None) -> int:
    ranks = {path: lora_A.shape[0] for path, (lora_A, _) in adapter.factors.items()}
    widest = max(ranks, key=lambda path: ranks[path])
    fitting = [choice for choice in RANKS if choice >= ranks[widest]]
    if not fitting:
        raise AdarankError(
            f"{widest} has rank {ranks[widest]}, engines take {RANKS[-1]} at most; merge the "
            "adapter (adarank merge), or train with max_rank=64"
        )
    if rank is None:
        return fitting[0]
    if rank < ranks[widest]:
        raise AdarankError(
            f"rank={rank} is too small: {widest} has rank {ranks[widest]}; use {fitting[0]}"
        )
    return rank


def _refuse_unsupported(config: LoraConfig) -> None:
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


def _split(
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


def _module_shapes(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, int] | None]:
    """Path in the bare base model -> (in, out), None for what is no linear.

    Modules saved whole are left out, and what PEFT put into its layers.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    whole = [f".{name}." for name in config.modules_to_save or []]
    shapes: dict[str, tuple[int, int] | None] = {}
    inside: tuple[str, ...] = ()
    for path, module in base.named_modules():
        if not path or path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{path}.",)
            module = module.get_base_layer()
        if not any(name in f".{path}." for name in whole):
            shapes[path] = linear_shape(module)
    return shapes


def _targets(
    shapes: Mapping[str, tuple[int, int] | None], adapted: Any
) -> tuple[list[str], list[str]]:
    """(target_modules, paths that they choose): every layer of the kinds that have an adapter.

    A kind is a path without its indices. Engines match by the last part of a name, so the shortest
    one that does is taken: "q_proj" rather than "self_attn.q_proj". If other kinds must come along
    (BERT has several "dense"), they get zeros too; if even that fails, full names are listed.
    """
    kinds = {_kind(path) for path in adapted}
    names: list[str] = []
    chosen: set[str] = set()
    for kind in sorted(kinds):
        parts = kind.split(".")
        last_index = max((i for i, part in enumerate(parts) if part == "*"), default=-1)
        tail = parts[last_index + 1 :]
        suffixes = [".".join(tail[-n:]) for n in range(1, len(tail) + 1)]
        found = {
            suffix: [p for p in shapes if p == suffix or p.endswith(f".{suffix}")]
            for suffix in suffixes
        }
        exact = [s for s in suffixes if all(_kind(path) in kinds for path in found[s])]
        linear = [s for s in suffixes[::-1] if all(shapes[p] is not None for p in found[s])]
        if best := (exact or linear)[:1]:
            names += best
            chosen.update(found[best[0]])
        else:
            full = [path for path in shapes if _kind(path) == kind and shapes[path] is not None]
            names += full
            chosen.update(full)
    return sorted(set(names)), [path for path in shapes if path in chosen]


def _kind(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
