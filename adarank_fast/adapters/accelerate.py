"""Switch fused layers on and off. Only the classes of modules change."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import nn

from adarank_fast.adapters.fused_linear import fused_classes, fused_layers, thread
from adarank_fast.adapters.gated_mlp import recompute_gated_mlps, restore_gated_mlps
from adarank_fast.adapters.graph_blocks import restore_blocks
from adarank_fast.adapters.groups import LayerState, Owner, form_group, owner_path
from adarank_fast.adapters.peft_private import has_only_experts
from adarank_fast.adapters.swapped import Swapped, put_back
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
    with undone_on_error(_as_now(peft_model)):
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


def _as_now(model: nn.Module) -> Callable[[], None]:
    """What puts classes and groups back, and drops outputs that wait in this thread."""
    classes = put_back(model)

    def undo() -> None:
        thread.waiting = thread.run = None
        classes()

    return undo


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
    thread.clear()
    with undone_on_error(_as_now(peft_model)):
        restore_blocks(peft_model)  # a block may itself be a fused layer or a gated MLP
        for _, layer in list(fused_layers(peft_model)):
            layer.__class__ = layer.plain_class()
            del layer._adarank
        restore_gated_mlps(peft_model)
    return peft_model
