"""PEFT's LoRA layers at nearly the speed of the frozen base: swap their class, keep all else.

`accelerate` gives each plain `peft.tuners.lora.Linear` (and those of bitsandbytes and torchao) a
class whose `forward` runs one fused node, for all layers that share an input. Parameters, names,
state dict, merging and adapter switching stay PEFT's. Whatever the fused node does not cover goes
through PEFT's own forward, counted and with its reason.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from adarank_fast.adapters.eligibility import (
    Known,
    active_name,
    dropout_of,
    has_plain_base,
    switched_off,
    why_not,
)
from adarank_fast.adapters.groups import Group, Owner, owner_path, remove_hooks
from adarank_fast.adapters.peft_private import TorchaoLoraLinear, bitsandbytes_layers
from adarank_fast.adapters.torch_private import constant_result, is_compiled
from adarank_kernels import grouped_lora_linear
from adarank_kernels.lora.op import Prepared, prepare

Layer = Any  # a PEFT layer of a class in _FUSED


class LayerState:
    """What a fused layer knows beyond PEFT's attributes."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.group: Group | None = None
        self.place = 0
        self.fused = 0
        self.fallbacks: Counter[str] = Counter()
        self.known: Known | None = None
        self.prepared: _Call | None = None  # in the first member's state, for its group

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "known": None, "prepared": None}  # a copy finds its own


_Call = tuple[list[Known | None], float, Prepared]


class _Fused:
    """Mixed in before a PEFT layer's class; overrides nothing but `forward`."""

    _adarank: LayerState

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state, counting = self._adarank, not torch.compiler.is_compiling()
        active = self._active_adapter  # type: ignore[attr-defined]
        adapter = active if isinstance(active, str) else tuple(active)
        if counting and state.place and not (args or kwargs or switched_off(self)):
            # The first member looked at all of them.
            output = state.group.hand_out(state.place, x, adapter)  # type: ignore[union-attr]
            if output is not None:
                state.fused += 1
                return output
        reason = "extra arguments" if args or kwargs else _reason(self, x)
        if reason:
            if counting:
                state.fallbacks[reason] += 1
                if state.group is not None:
                    state.group.clear()
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if counting:
            state.fused += 1
            if not state.owner.settled:
                state.owner.saw(self, x)  # type: ignore[arg-type]
        elif not state.owner.settled:
            _warn_compiled_early()
        group = state.group  # which may be new
        if group is not None and group.whole:
            if state.place or _all_fusable(group.members, x):
                output = group.call(state.place, x, adapter, _compute)
                if output is not None:
                    return output
            else:
                group.clear()
        return _compute([self], x)[0]


@constant_result  # so that it is run when traced
def _warn_compiled_early() -> bool:
    warnings.warn(
        "compiled before its groups are known: each LoRA layer is fused by itself; run one forward "
        "first, or pass accelerate(peft_model, example=batch)",
        stacklevel=2,
    )
    return True


class FusedLinear(_Fused, lora.Linear):
    """`peft.tuners.lora.Linear` with a fused forward."""


class FusedTorchaoLinear(_Fused, TorchaoLoraLinear):
    """PEFT's layer for weights quantised by torchao, with a fused forward."""


_FUSED: dict[type, type] = {lora.Linear: FusedLinear, TorchaoLoraLinear: FusedTorchaoLinear}


def _fused_classes() -> dict[type, type]:
    """PEFT class -> fused class; bitsandbytes' only where it is installed."""
    for plain in bitsandbytes_layers():
        if plain not in _FUSED:
            fused = type(f"Fused{plain.__name__}", (_Fused, plain), {"__module__": __name__})
            globals()[fused.__name__] = fused  # where pickle looks it up
            _FUSED[plain] = fused
    return _FUSED


def _all_fusable(members: Sequence[Layer], x: Tensor) -> bool:
    """Whether the first member, itself fusable, may compute the others too: one mask for all."""
    dropout = _dropout(members[0])
    for member in members[1:]:
        if _reason(member, x) or _dropout(member) != dropout:
            return False
    return True


def _dropout(layer: Layer) -> float:
    known: Known | None = layer._adarank.known
    if known is None or torch.compiler.is_compiling():
        return dropout_of(layer)
    return known.dropout


def _reason(layer: Layer, x: Tensor) -> str:
    """`why_not`, or what it said the last time if nothing changed since."""
    if torch.compiler.is_compiling():
        return why_not(layer, x)
    state: LayerState = layer._adarank
    if state.known is not None and state.known.holds(layer, x):
        return ""
    reason = why_not(layer, x)
    plain = not reason and type(layer.base_layer) is nn.Linear and has_plain_base(layer)
    state.known = Known(layer) if plain else None
    return reason


def _compute(layers: Sequence[Layer], x: Tensor) -> Sequence[Tensor]:
    """All outputs of layers that share the input x, in one node."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return _compute_anew(layers, x)
    knowns = [layer._adarank.known for layer in layers]
    if None in knowns:
        return _compute_anew(layers, x)
    state: LayerState = layers[0]._adarank
    dropout, kept = knowns[0].dropout, state.prepared
    if kept is not None and kept[0] == knowns and kept[1] == dropout and kept[2].fits(x):
        return kept[2](x)
    call = prepare(
        x,
        [known.weight for known in knowns],
        [known.A for known in knowns],
        [known.B for known in knowns],
        [known.scaling for known in knowns],
        [known.bias for known in knowns],
        dropout,
    )
    state.prepared = knowns, dropout, call
    return call(x)


def _compute_anew(layers: Sequence[Layer], x: Tensor) -> list[Tensor]:
    weights, biases = [], []
    lora_As, lora_Bs, scalings = [], [], []
    bases: list[Tensor | None] = []
    for layer in layers:
        name = active_name(layer)
        base = layer.base_layer
        if has_plain_base(layer):
            weights.append(base.weight if type(base) is nn.Linear else base.weight.t())
            biases.append(base.bias)
            bases.append(None)
        else:
            weights.append(None)
            biases.append(None)
            bases.append(base(x))
        lora_As.append(layer.lora_A[name].weight)
        lora_Bs.append(layer.lora_B[name].weight)
        scalings.append(layer.scaling[name])
    return grouped_lora_linear(
        x,
        weights,
        lora_As,
        lora_Bs,
        scalings,
        biases,
        dropout=dropout_of(layers[0]),
        base_outputs=bases,
    )


def accelerate(peft_model: nn.Module, example: Mapping[str, Any] | None = None) -> nn.Module:
    """Fuse the LoRA layers of a PEFT model, in place; a second call changes nothing.

    Layers that share an input are found in the first eager forward, or now from `example`.

    Args:
        peft_model: a `peft.PeftModel`, of uniform or mixed ranks, or any module with PEFT layers.
        example: keyword inputs for one forward in eval mode without gradients.

    Returns:
        `peft_model`.

    Raises:
        ValueError: there is no layer to fuse, or LoRA layers were sharded one by one before.
    """
    classes = _fused_classes()
    found = {path: m for path, m in peft_model.named_modules() if type(m) in classes}
    if found:
        _check_not_compiled(peft_model)
    owners: dict[str, Owner] = {}
    for path, layer in found.items():
        where = owner_path(peft_model, path)
        if where not in owners:
            owners[where] = Owner(peft_model.get_submodule(where))
        layer._adarank = LayerState(owners[where])
        layer.__class__ = classes[type(layer)]
    if not found and not any(fused_layers(peft_model)):
        for module in peft_model.modules():
            if isinstance(module, tuple(classes)):
                raise ValueError(
                    f"its LoRA layers are of class {type(module).__name__}, which something else "
                    "made; accelerate first, then shard or wrap them"
                )
        raise ValueError(
            f"{type(peft_model).__name__} has no LoRA layer of torch.nn.Linear; make one with "
            "adarank_fast.inject or peft.get_peft_model first"
        )
    if example is not None:
        _watch(peft_model, example)
    return peft_model


def _check_not_compiled(model: nn.Module) -> None:
    """Compiled code was made of PEFT's own layers."""
    for path, module in model.named_modules():
        if is_compiled(module):
            where = path or type(model).__name__
            raise ValueError(f"{where} is compiled already; accelerate first, then torch.compile")


def _watch(model: nn.Module, example: Mapping[str, Any]) -> None:
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(**example)
    finally:
        for module, mode in training.items():
            module.training = mode
    for owner in _owners(model):
        if not owner.settled:
            owner.settle()


def restore(peft_model: nn.Module) -> nn.Module:
    """Plain PEFT again: the same weights, classes and hooks as before `accelerate`.

    Raises:
        ValueError: LoRA layers got another class since (`fully_shard` on each); nothing is changed.
    """
    plain = {fused: cls for cls, fused in _FUSED.items()}
    layers = list(fused_layers(peft_model))
    for path, layer in layers:
        if type(layer) not in plain:
            raise ValueError(
                f"{path} became a {type(layer).__name__} after accelerate; restore before sharding"
            )
    remove_hooks(peft_model)
    for _, layer in layers:
        layer.__class__ = plain[type(layer)]
        del layer._adarank
    return peft_model


def fused_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, _Fused))


def _owners(model: nn.Module) -> list[Owner]:
    owners = {id(layer._adarank.owner): layer._adarank.owner for _, layer in fused_layers(model)}
    return list(owners.values())
