"""Put a plan's adapters into a model, and make sure that they are what the plan says."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from adarank_fast.adapters.accelerate import accelerate
from adarank_fast.adapters.patterns import keys_of_experts
from adarank_fast.adapters.peft_private import BaseTunerLayer, Layer
from adarank_fast.errors import AdarankError
from adarank_fast.models.deprecations import without_deprecations
from adarank_fast.models.quantization import keep_unpacked
from adarank_fast.models.targets import find_candidates, unwrap
from adarank_fast.options import refuse_unknown
from adarank_fast.plan.lora_config import alpha_rule, lora_config
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.undo import undone_on_error


def inject(
    model: nn.Module,
    plan: RankPlan,
    scaling: str | float = "constant",
    example: Mapping[str, object] | None = None,
    adapter_name: str = "default",
    **lora_config_kwargs: Any,
) -> PeftModel:
    """Give every module of the plan a LoRA adapter of its rank.

    The layers are PEFT's own, fused by `accelerate`: saving, loading with
    `PeftModel.from_pretrained`, merging and the trainers work as ever. Ranks of 0 get no adapter.

    Args:
        model: the model the plan was made on, or one that holds the same modules under one prefix
            (the task model around a base model, a wrapper). Changed in place, as PEFT does;
            quantised (bitsandbytes) models too.
        plan: see `predict_ranks` and `RankPlan.uniform`.
        scaling: what lora_alpha / rank is: "constant" (2 for every module; a number sets another
            constant), "paper" (8 / rank) or "rslora" (8 / sqrt(rank)).
        example: keyword inputs for one forward that shows which layers share an input; without it
            the first forward does. See `accelerate`.
        adapter_name: PEFT's name for the adapter.
        lora_config_kwargs: other `peft.LoraConfig` arguments, such as lora_dropout, bias,
            task_type, modules_to_save.

    Returns:
        The `peft.PeftModel`, after the rank and the scale of every layer were checked.

    Raises:
        AdarankError: the plan does not fit the model, the model has adapters already, all ranks are
            0, or PEFT made other adapters. The model is then unchanged.
    """
    refuse_unknown(inject, lora_config_kwargs, LoraConfig)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdarankError(
            "model already has PEFT adapters; pass the plain base model (peft_model.unload() "
            "removes them)"
        )
    if unwrap(model) is not model:
        raise AdarankError(
            f"model is wrapped in {type(model).__name__}; inject first, then compile or distribute"
        )
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        raise AdarankError(
            f"{type(model).__name__} is sharded (its parameters are DTensor); inject first, then "
            "fully_shard"
        )
    found = {target.path: target for target in find_candidates(model)}
    paths = resolve(model, plan)
    planned = {paths[name]: rank for name, rank in plan.ranks.items() if rank > 0}
    experts = {path for path in planned if found[path].parameter}
    if any(type(found[path].module).__name__ == "Conv1D" for path in planned):
        lora_config_kwargs.setdefault("fan_in_fan_out", True)  # its weight is [in, out]
    has_experts = any(target.parameter for target in found.values())
    config = lora_config(
        planned, scaling, parameters=experts, has_experts=has_experts, **lora_config_kwargs
    )
    with undone_on_error(_undo(model)), keys_of_experts(), without_deprecations():
        # for models that mix Conv1D and Linear PEFT corrects fan_in_fan_out layer by layer
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        peft_model = _get_peft_model(model, config, adapter_name)
        modules = planned.keys() - experts
        if has_experts and not modules <= set(config.target_modules or ()):
            raise AdarankError(OF_EXPERTS_TOO.format(type(model).__name__))
        _verify(model, planned, scaling, adapter_name)
        keep_unpacked(model)
        accelerate(peft_model, example)
        _warn_of_fast_path(model, planned)
    return peft_model


# PEFT gives targets of transformers 4, where experts were modules, to the parameters of today
OF_EXPERTS_TOO = (
    "PEFT takes every gate_proj, up_proj, down_proj, w1, w2 and w3 of {} for those of its experts; "
    'leave them out of target_modules (and name "experts" for the experts)'
)


def _get_peft_model(model: nn.Module, config: LoraConfig, adapter_name: str) -> PeftModel:
    try:
        return cast(PeftModel, get_peft_model(model, config, adapter_name=adapter_name))
    except ValueError as error:
        if "Cannot convert PEFT target" in str(error):
            raise AdarankError(OF_EXPERTS_TOO.format(type(model).__name__)) from error
        raise


def resolve(model: nn.Module, plan: RankPlan) -> dict[str, str]:
    """Where each of the plan's modules is in `model`: plan name -> path.

    Plan names are those of the bare base model. They are looked up under `model`'s own base model
    prefix first; failing that, under the one prefix that makes every name a module.

    Raises:
        AdarankError: names that do not exist, several prefixes that fit, or other shapes.
    """
    candidates = find_candidates(model)
    shapes = {target.path: (target.in_features, target.out_features) for target in candidates}
    own = {target.name: target.path for target in candidates}
    if plan.sizes.keys() <= own.keys():
        paths = {name: own[name] for name in plan.sizes}
    else:
        paths = _under_one_prefix(model, plan, shapes, own)
    other = [name for name, path in paths.items() if shapes[path] != plan.sizes[name]]
    if other:
        name, path = other[0], paths[other[0]]
        raise AdarankError(
            f"the plan does not fit {type(model).__name__}: {path} is {_by(shapes[path])}, the "
            f"plan's {name} is {_by(plan.sizes[name])} (in x out; {len(other)} of {len(paths)} "
            "differ); make a plan for this model"
        )
    return paths


def _under_one_prefix(
    model: nn.Module,
    plan: RankPlan,
    shapes: Mapping[str, tuple[int, int]],
    own: Iterable[str],
) -> dict[str, str]:
    first = next(iter(plan.sizes))
    prefixes = [path.removesuffix(first) for path in shapes if path.endswith(f".{first}")]
    fitting = [p for p in prefixes if all(f"{p}{name}" in shapes for name in plan.sizes)]
    if len(fitting) > 1:
        same = [
            p for p in fitting if all(shapes[f"{p}{n}"] == size for n, size in plan.sizes.items())
        ]
        fitting = same or fitting
    if len(fitting) > 1:
        raise AdarankError(
            f"the plan fits {type(model).__name__} at several paths ({', '.join(fitting)}); "
            "inject into the submodule you mean"
        )
    if fitting:
        return {name: f"{fitting[0]}{name}" for name in plan.sizes}
    own = set(own)
    missing = [name for name in plan.sizes if name not in own]
    near = difflib.get_close_matches(missing[0], own, n=3, cutoff=0.3) or sorted(own)[:3]
    made_on = plan.settings.get("model_class")
    raise AdarankError(
        f"the plan{f' (made on {made_on})' if made_on else ''} does not fit "
        f"{type(model).__name__}: it has no linear module {missing[0]} ({len(missing)} of "
        f"{len(plan.sizes)} names missing); near matches: {', '.join(near) or 'none'}; "
        "make a plan for this model"
    )


def _warn_of_fast_path(model: nn.Module, paths: Iterable[str]) -> None:
    """Warn if torch's encoder layers would ignore adapters: in eval mode they read bare weights."""
    if not torch.backends.mha.get_fastpath_enabled():
        return
    for path in paths:
        layer = model.get_submodule(path.rpartition(".")[0])
        if isinstance(layer, nn.TransformerEncoderLayer):
            warnings.warn(
                "torch.nn.TransformerEncoderLayer ignores its adapters in eval mode without "
                "gradients; call torch.backends.mha.set_fastpath_enabled(False)",
                stacklevel=3,
            )
            return


def _verify(
    model: nn.Module, planned: Mapping[str, int], scaling: str | float, adapter_name: str
) -> None:
    """Check that exactly the planned modules have an adapter, of the planned rank and scale."""
    alpha_of = alpha_rule(scaling)
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and adapter_name in getattr(module, "r", {}):
            part = getattr(module, "parameter_name", "")  # wrappers of one module are nested
            found[f"{path.replace('.base_layer', '')}.{part}" if part else path] = module
    if odd := sorted(planned.keys() ^ found.keys()):
        what = "got no adapter though planned" if odd[0] in planned else "got an unplanned adapter"
        raise AdarankError(
            f"{odd[0]} {what} ({len(odd)} such modules): check modules_to_save and other "
            "LoraConfig arguments that choose modules"
        )
    for path, rank in planned.items():
        layer: Layer = found[path]
        experts = getattr(layer, "num_experts", 1)
        weight_ranks = (
            layer.lora_A[adapter_name].weight.shape[0] // experts,
            layer.lora_B[adapter_name].weight.shape[1] // experts,
        )
        scale = alpha_of(rank) / (math.sqrt(rank) if scaling == "rslora" else rank)
        if weight_ranks != (rank, rank) or not math.isclose(layer.scaling[adapter_name], scale):
            raise AdarankError(
                f"PEFT gave {path} ranks {weight_ranks} and scale {layer.scaling[adapter_name]}, "
                f"planned were {rank} and {scale}: check the LoraConfig arguments"
            )


def _undo(model: nn.Module) -> Callable[[], None]:
    """A function that restores modules, parameters, classes, modes, hooks, all attributes."""
    modules = [
        (module, type(module), dict(module.__dict__), _registries(module))
        for module in model.modules()
    ]
    # .detach() shares the storage, so no weight is copied; PiSSA and others swap `.data`
    parameters = [(p, p.detach(), p.requires_grad) for p in model.parameters()]
    config = getattr(model, "config", None)
    settings = dict(getattr(config, "__dict__", {}))

    def undo() -> None:
        for module, cls, attributes, registries in modules:
            module.__class__ = cls
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
            for registry, entries in registries:
                registry.clear()
                registry.update(entries)
        for parameter, data, requires_grad in parameters:
            if parameter.data_ptr() != data.data_ptr():
                with torch.no_grad():
                    parameter.data = data
            parameter.requires_grad_(requires_grad)
        if settings:
            vars(config).clear()
            vars(config).update(settings)

    return undo


def _registries(module: nn.Module) -> list[tuple[dict[object, object], dict[object, object]]]:
    """The module's children, parameters, buffers and hooks: (a dict of it, its entries now)."""
    return [(value, dict(value)) for value in module.__dict__.values() if isinstance(value, dict)]


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"
