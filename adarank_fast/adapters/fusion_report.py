"""What is fused in a PEFT model, with what, and why not."""

from __future__ import annotations

import html
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft.tuners import lora
from torch import nn

from adarank_fast.adapters.fused_linear import fused_layers
from adarank_fast.adapters.gated_mlp import gated_mlps
from adarank_fast.adapters.groups import LayerState
from adarank_fast.adapters.peft_private import has_only_experts
from adarank_fast.errors import AdarankError
from adarank_fast.models.text import data_frame
from adarank_kernels.runtime import native
from adarank_kernels.runtime.registry import HAS_TRITON, kernel_status

if TYPE_CHECKING:
    import pandas

OF_EXPERTS = (
    "parameters of experts, for which PEFT's lora.ParamWrapper adds B A to the weight of every "
    "expert in each forward"
)


@dataclass(frozen=True)
class LayerReport:
    """One layer: what its forwards did since `accelerate` (compiled ones are not counted).

    Attributes:
        fused: False for PEFT layers of other kinds (embeddings, convolutions, expert parameters),
            and if every call so far fell back.
        group: names of the layers computed together with it, itself included.
        fused_calls, fallback_calls: eager forwards that took each path.
        reasons: why calls fell back -> how many; 0 for other kinds of layers, not counted.
    """

    fused: bool
    group: tuple[str, ...]
    fused_calls: int
    fallback_calls: int
    reasons: dict[str, int]


class FusionReport(dict[str, LayerReport]):
    """Layer path -> `LayerReport`; prints as a summary.

    Attributes:
        kernels: device of fused layers -> Triton kernel -> "passed" its check there, "failed: why",
            "not checked yet", "no Triton", or "waits for a verdict" on its speed, and does not run.
            The CPU uses none and is not listed.
        recomputed_mlps: gated MLPs that keep only gate(x) and up(x).
    """

    kernels: dict[str, dict[str, str]]
    recomputed_mlps: int = 0

    @property
    def fused_share(self) -> float:
        """Share of the calls so far that took the fused path; 1.0 before any call."""
        fused = sum(layer.fused_calls for layer in self.values())
        calls = fused + sum(layer.fallback_calls for layer in self.values())
        return fused / calls if calls else 1.0

    def __repr__(self) -> str:
        return f"FusionReport({self._summary()}); .to_frame()"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_frame(self) -> pandas.DataFrame:
        """A row for each layer: the fields of its `LayerReport`.

        Raises:
            AdarankImportError: pandas is not installed.
        """
        return data_frame({path: vars(layer) for path, layer in self.items()})

    def __str__(self) -> str:
        reasons: Counter[str] = Counter()
        others: Counter[str] = Counter()
        for layer in self.values():
            for reason, count in layer.reasons.items():
                if count:
                    reasons[reason] += count
                else:
                    others[reason] += 1
        lines = [self._summary()]
        lines += [f"  {count} calls through PEFT: {why}" for why, count in reasons.most_common()]
        lines += [f"  {count} layers left to PEFT: {why}" for why, count in others.most_common()]
        if self.recomputed_mlps:
            lines.append(f"  {self.recomputed_mlps} gated MLPs keep only gate and up for backward")
        for device, kernels in self.kernels.items():
            status = ", ".join(f"{name} {what}" for name, what in kernels.items())
            lines.append(f"  Triton kernels on {device}: {status}")
        return "\n".join(lines)

    def _summary(self) -> str:
        groups = {layer.group for layer in self.values() if len(layer.group) > 1}
        called = any(layer.fused_calls or layer.fallback_calls for layer in self.values())
        share = f"{100 * self.fused_share:.1f}% of calls fused" if called else "no forward yet"
        fused = sum(layer.fused for layer in self.values())
        return f"{fused} of {len(self)} LoRA layers fused, {len(groups)} groups, {share}"


def fusion_report(peft_model: nn.Module) -> FusionReport:
    """What is fused, with what, and why not.

    Raises:
        AdarankError: `accelerate` was not called.
    """
    layers = dict(fused_layers(peft_model))
    if not layers and not has_only_experts(peft_model):
        raise AdarankError("nothing is fused: call adarank_fast.accelerate(peft_model) first")
    names = {id(layer): path for path, layer in layers.items()}
    report = FusionReport()
    devices = {p.device for layer in layers.values() for p in layer.parameters()}
    report.kernels = {str(d): kernel_status(d) for d in devices if d.type == "cuda"}
    report.recomputed_mlps = sum(1 for _ in gated_mlps(peft_model))
    for path, layer in layers.items():
        state: LayerState = layer._adarank
        group = state.group
        members = [layer] if group is None else group.layers
        fallbacks = sum(state.fallbacks.values())
        report[path] = LayerReport(
            fused=state.fused > 0 or not fallbacks,
            group=tuple(names.get(id(member), "") for member in members),
            fused_calls=state.fused,
            fallback_calls=fallbacks,
            reasons=dict(state.fallbacks),
        )
    for path, module in peft_model.named_modules():
        if isinstance(module, lora.LoraLayer) and path not in layers:
            reason = f"PEFT's lora.{type(module).__name__}, which has no fused form"
            if isinstance(module, lora.ParamWrapper):
                reason = OF_EXPERTS
            report[path] = LayerReport(False, (path,), 0, 0, {reason: 0})
    return report


def products(model: nn.Module) -> str:
    """What computes the fused layers' products with few ranks; results differ in the last bits.

    Returns:
        "C++", "Triton" or "torch"; "PEFT" where no layer is fused.
    """
    weights = (p for _, layer in fused_layers(model) for p in layer.parameters())
    device = next((p.device.type for p in weights), None)
    if device is None:
        return "PEFT"
    if device == "cpu":
        return "torch" if native.operators() is None else "C++"
    return "Triton" if device == "cuda" and HAS_TRITON else "torch"
