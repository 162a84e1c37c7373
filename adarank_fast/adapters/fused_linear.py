"""PEFT's LoRA layers at nearly the speed of the frozen base: swap their class, keep all else.

`accelerate` gives each plain `peft.tuners.lora.Linear` (and those of bitsandbytes and torchao) a
class whose `forward` runs one fused node, for all layers that share an input. Parameters, names,
state dict, merging, adapter switching, `repr` and pickles stay PEFT's. Whatever the fused node does
not cover goes through PEFT's own forward, counted and with its reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from peft.tuners import lora
from torch import Tensor, nn

from adarank_fast.adapters.eligibility import (
    dropout_of,
    returns_its_own,
    why_not,
    why_not_here,
)
from adarank_fast.adapters.groups import (
    Call,
    LayerState,
    Run,
    ThreadState,
    Waiting,
    form_group,
    may_be_repeated,
    repeat_guard,
)
from adarank_fast.adapters.members import AnyMember, remember
from adarank_fast.adapters.peft_private import Layer, TorchaoLoraLinear, bitsandbytes_layers
from adarank_fast.adapters.swapped import Swapped
from adarank_fast.adapters.terms import (
    adapters_of,
    bias_of,
    finished,
    has_plain_base,
    low_rank,
    weight_of,
)
from adarank_fast.adapters.torch_private import constant_result
from adarank_kernels import grouped_lora_linear
from adarank_kernels.lora.group import Group
from adarank_kernels.lora.op import run as run_group

thread = ThreadState()
_is_compiling = torch.compiler.is_compiling


class _Fused(Swapped):
    """Mixed in before a PEFT layer's class."""

    HIDDEN = "_adarank"
    PLAIN: ClassVar[dict[type, type]] = {}
    _adarank: LayerState

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if _is_compiling():
            return _forward_compiled(self, x, args, kwargs)
        own = self.__dict__
        state: LayerState = own["_adarank"]
        waiting = thread.waiting
        if waiting is not None:
            if waiting.x is x and not (args or kwargs):
                output = waiting.take(state, own)
                if output is not None:
                    state.fused += 1
                    if not waiting.left:
                        thread.waiting, waiting.group.missed = None, 0
                    return output
            thread.clear()  # which may dissolve the group
        call = state.steady
        if call is not None and thread.run is None and not (args or kwargs):
            outputs = call.outputs(x)
            if outputs:
                state.fused += 1
                if state.group is not None:
                    thread.waiting = Waiting(
                        state.group, x, call.dropout, outputs, call.members, call.kind, call.index
                    )
                return outputs[0]
        reason = "extra arguments" if args or kwargs else why_not_here(x)
        member = state.member
        if not reason and (member is None or not member.holds(own) or not _same_kind(member, x)):
            state.call = state.steady = None
            reason = why_not(self, x)
            state.member = member = None if reason else remember(self)
        if reason:
            state.fallbacks[reason] += 1
            thread.clear()
            plain: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return plain
        state.fused += 1
        run = thread.run
        if run is not None and not run.goes_on(x, self):
            thread.clear()  # which may make this layer a member: known before it is computed
        if state.candidates is not None:
            form_group(self)
        if state.group is not None:
            thread.clear()
        group = state.group
        if group is None:
            return _alone(self, x)
        if group.layers[0] is not self or x.is_inference():  # too late, or changes leave no trace
            return _compute([self], x)[0]
        outputs = _compute(group.layers, x) if _alike(group.layers, x) else _compute([self], x)
        if len(outputs) > 1:
            members = [layer._adarank.member for layer in group.layers]
            if None not in members:
                dropout = members[0].dropout
                if dropout is None:
                    dropout = _dropout_among(members)
                device = x.device
                thread.waiting = Waiting(
                    group, x, dropout, outputs, members, device.type, device.index or 0
                )
        return outputs[0]


class FusedLinear(_Fused, lora.Linear):
    """`peft.tuners.lora.Linear` with a fused forward."""


class FusedTorchaoLinear(_Fused, TorchaoLoraLinear):
    """PEFT's layer for weights quantised by torchao, with a fused forward."""


FUSED: dict[type, type] = {lora.Linear: FusedLinear, TorchaoLoraLinear: FusedTorchaoLinear}
PLAIN = _Fused.PLAIN
PLAIN |= {fused: plain for plain, fused in FUSED.items()}


def fused_classes() -> dict[type, type]:
    """PEFT class -> fused class; bitsandbytes' only where it is installed."""
    for plain in bitsandbytes_layers():
        if plain not in FUSED:
            fused = type(f"Fused{plain.__name__}", (_Fused, plain), {"__module__": __name__})
            globals()[fused.__name__] = FUSED[plain] = fused
            PLAIN[fused] = plain
    return FUSED


def _same_kind(member: AnyMember, x: Tensor) -> bool:
    return member.foreign or member.own_weight.dtype is x.dtype


def _alone(layer: Layer, x: Tensor) -> Tensor:
    """A layer that is in no group: watched, and under one dropout mask with its neighbours."""
    state: LayerState = layer._adarank
    run = thread.watch(layer, x)
    output = _compute([layer], x, run)[0]
    if run is not None and may_be_repeated():
        repeat_guard(output, state.owner)
    return output


def _alike(layers: Sequence[Layer], x: Tensor) -> bool:
    """Whether the first layer, itself fusable, may compute the others too: one mask for all."""
    dropout = None
    for layer in layers:
        state: LayerState | None = layer.__dict__.get("_adarank")
        if state is None:
            return False
        member = state.member
        if layer is not layers[0] and (member is None or not member.holds(layer.__dict__)):
            if why_not(layer, x):
                return False
            state.member = member = remember(layer)
        if member is None:  # examined in every call
            return False
        p = member.dropout
        if dropout is None:
            dropout = p
        elif p != dropout and p is not None:
            return False
    return True


def _dropout_among(members: Sequence[AnyMember]) -> float:
    """Of those with an active adapter, which are alike."""
    return next((p for m in members if (p := m.dropout) is not None), 0.0)


def _compute(layers: Sequence[Layer], x: Tensor, run: Run | None = None) -> Sequence[Tensor]:
    """All outputs of layers that share the input x, in one node."""
    state: LayerState = layers[0]._adarank
    members = [layer._adarank.member for layer in layers]
    if None in members or torch.is_autocast_enabled(x.device.type):
        return _compute_anew(layers, x)
    dropout, call, made = members[0].dropout, state.call, False
    if dropout is None:  # no active adapter in the first
        dropout = _dropout_among(members)
    state.steady = None
    if call is None or call.members != members or call.dropout != dropout or not call.group.fits(x):
        made = any([m.made for m in members])
        W, b, A, B, scalings = zip(*[m.parts() for m in members], strict=True)
        safe = frozenset(i for i, m in enumerate(members) if returns_its_own(m.base))
        group = Group(x, W, b, A, B, scalings, dropout, safe)
        call = Call(group, layers, members, dropout)
        state.call = None if made else call
    group = call.group
    if (
        run is None
        and not made
        and not x.is_inference()
        and (len(layers) > 1 or state.group is None)
    ):
        state.steady = call
    seed = None
    if run is not None and dropout:
        if run.seed is None or not group.takes(run.seed):
            run.seed = group.draw(x)
        seed = run.seed
    outputs = run_group(group, x, seed, call.bases(x))
    if made:
        return [m.finished(Y) if m.made else Y for m, Y in zip(members, outputs, strict=True)]
    return outputs


def _compute_anew(layers: Sequence[Layer], x: Tensor) -> list[Tensor]:
    """The same, with nothing remembered."""
    terms = [adapters_of(layer) for layer in layers]
    own_biases = [getattr(layer.base_layer, "bias", None) for layer in layers]
    weights: list[Tensor | None] = []
    biases: list[Tensor | None] = []
    bases: list[Tensor | None] = []
    for layer, adapters, bias in zip(layers, terms, own_biases, strict=True):
        base = layer.base_layer
        plain = has_plain_base(layer)
        weights.append(weight_of(layer) if plain else None)
        biases.append(bias_of(bias, adapters, base.weight.dtype) if plain else None)
        output = None if plain else base(x)
        if output is not None and not (returns_its_own(base) or _is_compiling()):
            output = output.clone()
        bases.append(output)
    lora_As, lora_Bs, scalings = zip(*[low_rank(adapters) for adapters in terms], strict=True)
    dropouts = [p for p in map(dropout_of, layers) if p is not None]
    outputs = grouped_lora_linear(
        x,
        weights,
        lora_As,
        lora_Bs,
        scalings,
        biases,
        dropout=dropouts[0] if dropouts else 0.0,
        base_outputs=bases,
    )
    return [finished(*each) for each in zip(outputs, weights, own_biases, terms, strict=True)]


def _forward_compiled(
    layer: Layer, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
) -> Tensor:
    """What torch.compile traces: the same, with nothing remembered between calls."""
    _finish_watching()
    state: LayerState = layer._adarank
    reason = "extra arguments" if args or kwargs else why_not(layer, x)
    if reason:
        plain: Tensor = super(_Fused, layer).forward(x, *args, **kwargs)
        return plain
    group = state.group
    if group is None:
        if not state.alone:
            _warn_compiled_early()
        return _compute_anew([layer], x)[0]
    if state.position:
        traced, group.traced = group.traced, None
        if traced is not None and traced[0] is x:
            output = traced[1][state.position]
            if state.position + 1 < len(group.layers):
                group.traced = traced
            return output
        return _compute_anew([layer], x)[0]
    if any(why_not(other, x) for other in group.layers[1:]):
        return _compute_anew([layer], x)[0]
    if len({dropout_of(member) for member in group.layers} - {None}) > 1:
        return _compute_anew([layer], x)[0]
    outputs = _compute_anew(group.layers, x)
    group.traced = x, outputs
    return outputs[0]


@constant_result
def _finish_watching() -> bool:
    """The last layers that an eager forward called become a group before a compiler looks at it."""
    thread.clear()
    return True


@constant_result
def _warn_compiled_early() -> bool:
    warnings.warn(
        "compiled before its groups are known: each LoRA layer is fused by itself; run one forward "
        "first, or pass accelerate(peft_model, example=batch)",
        stacklevel=2,
    )
    return True


def fused_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Path and module of every layer that is fused now."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, _Fused))
