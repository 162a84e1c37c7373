"""Adapters for serving engines: one rank everywhere, each layer's scale folded into B.

Zero rows of A and zero columns of B change nothing, and (s B) A = s (B A): an adapter of mixed
ranks and scales becomes a plain one of rank R and scale 1 that computes the same function. Layers
without an adapter get one of zeros, so that every layer of a kind has one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from adarank_fast.adapters.adapter_files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Adapter,
    check_tensors,
    refuse_unsupported,
    split,
)
from adarank_fast.adapters.patterns import check_patterns
from adarank_fast.adapters.peft_private import BaseTunerLayer, is_target
from adarank_fast.errors import AdarankError
from adarank_fast.files import new_folder
from adarank_fast.models.targets import linear_shape
from adarank_fast.options import check_number

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

RANKS = (8, 16, 32, 64)  # what every engine's kernels take


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
        folder: see `export_uniform`.
        rank: see `export_uniform`.

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
    configs: Mapping[str, object] = getattr(peft_model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, LoraConfig):
        there = ", ".join(configs) or "none"
        raise AdarankError(f"{adapter_name!r} is no LoRA adapter of the model; it has: {there}")
    refuse_unsupported(config)
    state = get_peft_model_state_dict(
        peft_model, adapter_name=adapter_name, save_embedding_layers=False
    )
    factors, others = split(state)
    base = cast("PreTrainedModel", cast("PeftModel", peft_model).get_base_model())
    if _is_resized(base, config.base_model_name_or_path):
        others = {**_vocabulary(base), **others}
    if config.task_type is None and config.auto_mapping is None:  # as save_pretrained does
        mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
        config = replace(config, auto_mapping=mapping)
    scales = {
        path: cast("LoraLayer", layer).scaling[adapter_name]
        for path, layer in base.named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter_name in getattr(layer, "scaling", {})
    }
    return Adapter(config, factors, scales, others)


def _is_resized(base: PreTrainedModel, name: str | None) -> bool:
    """Whether the model's vocabulary is of another size than its checkpoint's."""
    size = _vocabulary_size(getattr(base, "config", None))
    if size is None:
        return False
    if name:
        try:
            return _vocabulary_size(type(base.config).from_pretrained(name)) not in (None, size)
        except Exception:  # no such checkpoint, or the hub cannot be reached
            pass
    # modules note the size that they were made with, and resizing does not touch the inner ones
    noted = {getattr(module, "vocab_size", size) for module in base.modules()}
    return any(isinstance(other, int) and other != size for other in noted)


def _vocabulary_size(config: object) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def _vocabulary(base: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the embedding and the head, by their names in an adapter file."""
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    found: dict[str, Tensor] = {}
    for path, module in base.named_modules():
        if any(module is end for end in ends):
            layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            weights: Iterator[tuple[str, Tensor]] = layer.named_parameters(recurse=False)
            found |= {f"{PREFIX}{path}.{part}": weight for part, weight in weights}
    return found


def check_fits(adapter: Adapter, base_model: nn.Module) -> None:
    """Check that the adapter has tensors for exactly the modules that its configuration chooses.

    Raises:
        AdarankError: which module is too many or missing.
    """
    shapes = _module_shapes(base_model, adapter.config)
    check_patterns(adapter.config, list(shapes))
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
    names, paths = _targets(shapes, adapter.factors.keys())
    layers = {f"{PREFIX}{path}.": f"{PREFIX}{path}.base_layer." for path in paths}
    tensors = {}
    for name, tensor in adapter.others.items():  # a resized head gets zeros as an adapter, say
        layer, _, part = name.rpartition(".")
        tensors[layers.get(f"{layer}.", f"{layer}.") + part] = tensor
    factors = [factor for pair in adapter.factors.values() for factor in pair]
    dtype = reduce(torch.promote_types, (factor.dtype for factor in factors))
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
    config.save_pretrained(str(folder))
    # clones, since a file cannot have one storage twice, as of a head tied to the embedding
    saved = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    check_tensors(saved, floating=False)
    save_file(saved, folder / WEIGHTS, metadata={"format": "pt"})
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


def _module_shapes(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, int] | None]:
    """Path in the bare base model -> (in, out), None for what is no linear.

    Modules saved whole are left out, and what PEFT put into its layers.
    """
    base = cast("PeftModel", model).get_base_model() if hasattr(model, "get_base_model") else model
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
    shapes: Mapping[str, tuple[int, int] | None], adapted: Iterable[str]
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
