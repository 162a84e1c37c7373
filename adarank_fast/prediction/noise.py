"""The noise of a probe: its key, its scale, and the tensors of a chunk of probes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from adarank_fast.errors import AdarankError
from adarank_fast.models.quantization import is_packed, plain_weight
from adarank_fast.models.targets import Target, linear_shape
from adarank_fast.options import check_number
from adarank_kernels import philox_normal

Stds = Mapping[str, tuple[float, float]]  # target name -> of its weight, of its bias


@dataclass(frozen=True)
class Variant:
    """One perturbed copy of the model: which module, which trial."""

    target: Target
    trial: int


def noise_bytes(target: Target, folded: bool = True) -> int:
    """The noise of one variant's weight."""
    return _dtype(target, folded).itemsize * math.prod(weight_shape(target))


def _dtype(target: Target, folded: bool) -> torch.dtype:
    """A product takes noise of its own type; a perturbed copy is rounded after the sum."""
    narrow = folded and target.weight.is_floating_point()
    return target.weight.dtype if narrow else torch.float32


class Noise:
    """The noise of a chunk, scaled, one tensor a module: drawn once for all batches."""

    def __init__(self, chunk: Sequence[Variant], stds: Stds, seed: int, folded: bool) -> None:
        self._first: dict[Target, int] = {}
        self._weights: dict[Target, Tensor] = {}
        self._biases: dict[Target, Tensor] = {}
        for index, variant in enumerate(chunk):
            self._first.setdefault(variant.target, index)
        for target in self._first:
            trials = [variant.trial for variant in chunk if variant.target is target]
            empty = partial(torch.empty, dtype=_dtype(target, folded), device=target.weight.device)
            self._weights[target] = empty(len(trials), *weight_shape(target))
            parts = [("weight", self._weights[target])]
            if target.bias is not None:
                self._biases[target] = empty(len(trials), *target.bias.shape)
                parts.append(("bias", self._biases[target]))
            for (part, out), std in zip(parts, stds[target.name], strict=False):
                for row, trial in zip(out, trials, strict=True):
                    key = noise_key(seed, target.name, part, trial)
                    row.copy_(philox_normal(row.shape, key, device=row.device).mul_(std))

    def of(self, target: Target, some: range) -> tuple[slice, Tensor, Tensor | None]:
        """Which of the variants `some` perturb `target`; their noise [k, in, out] and [k, out]."""
        first, weights = self._first[target], self._weights[target]
        biases = self._biases.get(target)
        start, stop = max(some.start, first), min(some.stop, first + len(weights))
        trials = slice(start - first, stop - first)
        weights = weights[trials]
        if isinstance(target.module, nn.Linear):  # Conv1D stores [in, out]
            weights = weights.transpose(1, 2)
        variants = slice(start - some.start, stop - some.start)
        return variants, weights, None if biases is None else biases[trials]

    def parameters(self, target: Target) -> dict[str, Tensor]:
        """Perturbed copies of the parameters of a chunk's only variant."""
        weight, bias = target.weight, target.bias
        if not target.parameter and is_packed(target.module):
            raise AdarankError(
                f"{target.name} is quantised and cannot be probed in a folded batch; leave it out "
                "of target_modules or load it in a floating-point type"
            )
        parameters = {target.weight_path: (weight + self._weights[target][0]).to(weight.dtype)}
        if bias is not None:
            perturbed = bias + self._biases[target][0]
            parameters[f"{target.path}.bias"] = perturbed.to(bias.dtype)
        return parameters


def weight_shape(target: Target) -> tuple[int, ...]:
    """The shape of the weight, in its own layout; also of one that is stored packed."""
    if target.parameter:
        return tuple(target.weight.shape)
    shape = target.in_features, target.out_features
    return shape[::-1] if isinstance(target.module, nn.Linear) else shape


def measure_stds(targets: Iterable[Target]) -> Stds:
    """The population standard deviation of each target's weight and bias, in float64."""
    return {
        target.name: (_std(plain_weight(target.module, target.parameter)), _std(target.bias))
        for target in targets
    }


def _std(parameter: Tensor | None) -> float:
    return 0.0 if parameter is None else parameter.detach().double().std(correction=0).item()


def noise_key(seed: int, name: str, part: str, trial: int) -> int:
    """The Philox key of one noise tensor: 64 bits of SHA-256 over what identifies it."""
    text = f"{seed}|{name}|{part}|{trial}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def perturbation(
    module: nn.Module, name: str, trial: int, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The noise that a probe adds to a module's weight and bias.

    Args:
        module: a Linear or Conv1D, or the experts that hold the parameter `name`.
        name: its canonical name (as in `plan.ranks`).
        trial: counted from 0.
        seed: of the run.

    Returns:
        (weight noise in the weight's own layout, bias noise or None), float32. Their standard
        deviation is that of the parameter: the population's, in float64.
    """
    trial, seed = check_number("trial", trial), check_number("seed", seed)

    def draw(parameter: Tensor, part: str) -> Tensor:
        key = noise_key(seed, name, part, trial)
        noise = philox_normal(parameter.shape, key, device=parameter.device)
        return noise.mul_(_std(parameter))

    if linear_shape(module) is None:
        return draw(plain_weight(module, name.rpartition(".")[2]), "weight"), None
    bias = getattr(module, "bias", None)
    return draw(plain_weight(module), "weight"), None if bias is None else draw(bias, "bias")
