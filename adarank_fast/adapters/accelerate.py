"""Switch fused layers on and off. Only the classes of modules change."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from adarank_fast.adapters.fused_linear import fused_classes, fused_layers, thread
from adarank_fast.adapters.gated_mlp import gated_mlps, recompute_gated_mlps, restore_gated_mlps
from adarank_fast.adapters.graph_blocks import restore_blocks
from adarank_fast.adapters.groups import LayerState, Owner, form_group, owner_path
from adarank_fast.adapters.peft_private import Layer, has_only_experts
from adarank_fast.adapters.swapped import Swapped
from adarank_fast.adapters.torch_private import is_compiled
from adarank_fast.errors import AdarankError
from adarank_fast.undo import undone, undone_on_error


def accelerate(
    peft_model: nn.Module,
    example: Mapping[str, object] | None = None,
    recompute_mlp: bool = False,
) -> nn.Module:
    """Fuse the LoRA layers of a PEFT model, in place; a second call changes nothing.

    Layers that share an input are found in the first eager forward, or now from `example`.

    Args:
        peft_model: a `peft.PeftModel`, of uniform or mixed ranks, or any module with PEFT layers.
        example: keyword inputs for one forward in eval mode without gradients.
        recompute_mlp: keep only gate(x) and up(x) of gated MLPs, down(act(gate(x)) * up(x)), for
            the backward pass, which computes the other two tensors again. A layer of Llama then
            keeps about a third less, for two more elementwise operations. Not used under
            checkpointing, which keeps even less, nor in compiled code.

    Returns:
        `peft_model`.

    Raises:
        AdarankError: there is no layer to fuse, or LoRA layers were sharded one by one before.
    """
    classes = fused_classes()
    found = {path: m for path, m in peft_model.named_modules() if type(m) in classes}
    if found:
        _check_not_compiled(peft_model)
    if not found and not any(fused_layers(peft_model)):
        for module in peft_model.modules():
            if isinstance(module, tuple(classes)):
                raise AdarankError(
                    f"its LoRA layers are of class {type(module).__name__}, which something else "
                    "made; accelerate first, then shard or wrap them"
                )
        if has_only_experts(peft_model):
            return peft_model  # the report says why not
        raise AdarankError(
            f"{type(peft_model).__name__} has no LoRA layer of torch.nn.Linear; make one with "
            "adarank_fast.inject or peft.get_peft_model first"
        )
    owners: dict[str, Owner] = {}
    mlps = set(gated_mlps(peft_model))

    def undo() -> None:
        restore_gated_mlps(peft_model, mlps)
        _put_back([(layer, plain, {}) for layer, plain in classes_before.items()])

    classes_before = {layer: type(layer) for layer in found.values()}
    with undone_on_error(undo):
        for path, layer in found.items():
            owner = owners.setdefault(owner_path(peft_model, path), Owner())
            layer._adarank = LayerState(owner)
            layer.__class__ = classes[type(layer)]
        if recompute_mlp and not recompute_gated_mlps(peft_model):
            warnings.warn(
                f"recompute_mlp: {type(peft_model).__name__} has no MLP of the form "
                "down(act(gate(x)) * up(x))",
                stacklevel=2,
            )
        if example is not None:
            _watch(peft_model, example)
    return peft_model


def _put_back(layers: Sequence[tuple[Layer, type, Mapping[str, LayerState]]]) -> None:
    """Restore each layer's class and `_adarank`, and drop outputs that wait in this thread."""
    thread.waiting = thread.run = None
    for layer, plain, state in layers:
        layer.__class__ = plain
        layer.__dict__.pop("_adarank", None)
        layer.__dict__.update(state)


def _check_not_compiled(model: nn.Module) -> None:
    """Refuse compiled modules: their code was made of PEFT's own layers."""
    for path, module in model.named_modules():
        if is_compiled(module):
            where = path or type(model).__name__
            raise AdarankError(f"{where} is compiled already; accelerate first, then torch.compile")


def _watch(model: nn.Module, example: Mapping[str, object]) -> None:
    training = {module: module.training for module in model.modules()}

    def undo() -> None:
        for module, mode in training.items():
            module.training = mode

    with undone(undo), torch.no_grad():
        model.eval()
        model(**example)
    thread.clear()
    for _, layer in fused_layers(model):
        form_group(layer)


def restore(peft_model: nn.Module) -> nn.Module:
    """Plain PEFT again: weights, classes and hooks as before `accelerate` and `graph_blocks`.

    Raises:
        AdarankError: a module got another class since (`fully_shard` on it); none changes.
    """
    for path, module in peft_model.named_modules():
        if isinstance(module, Swapped) and type(module) not in module.PLAIN:
            raise AdarankError(
                f"{path} became a {type(module).__name__} after accelerate; restore before sharding"
            )
    layers = list(fused_layers(peft_model))
    thread.clear()
    before = [(layer, type(layer), {"_adarank": layer._adarank}) for _, layer in layers]
    restore_blocks(peft_model)  # a block may itself be a fused layer or a gated MLP
    with undone_on_error(partial(_put_back, before)):
        for _, layer in layers:
            layer.__class__ = layer.plain_class()
            del layer._adarank
        restore_gated_mlps(peft_model)
    return peft_model
