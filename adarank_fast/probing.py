"""Run the probes: every (module, trial) that is asked for, a block at a time.

Blocks outside, batches inside: noise is made once per (module, trial), in chunks, and only the
activations at the current block's entrance are kept.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from adarank_fast.disagreement import disagreement_sums, positions
from adarank_fast.memory import Memory
from adarank_fast.outputs import position_mask
from adarank_fast.quantised import is_packed, plain_weight
from adarank_fast.replay import BY_CONTENT, FOLDED, NEVER_CALLED, Replay
from adarank_fast.reuse import Forward
from adarank_fast.targets import Target, alternatives, linear_shape
from adarank_kernels import philox_normal

FOLDED_TOKENS = {"cpu": 2048, "cuda": 65536}  # rows of a folded batch, beyond which nothing is won

COMPARED = 15  # variants at once beside the clean pass: as many as the kernels take

Stds = Mapping[str, tuple[float, float]]  # target name -> of its weight, of its bias


@dataclass(frozen=True)
class Variant:
    """One perturbed copy of the model: which module, which trial."""

    target: Target
    trial: int


class _Unfoldable(Exception):
    """A target got other rows than the folded batch should have given it."""

    def __init__(self, target: Target) -> None:
        self.target = target


class Prober:
    """Finds disagreements with the clean pass that `replay` recorded.

    Args:
        model: unwrapped, inside `undisturbed`.
        replay: of that model.
        seed: of the noise.
        metric: see `disagreement_sums`.
        stds: as `measure_stds` returns them.
        memory: what may be held. One variant is probed at a time at least, whatever it takes.
    """

    def __init__(
        self,
        model: nn.Module,
        replay: Replay,
        seed: int,
        metric: str,
        stds: Stds,
        memory: Memory,
    ) -> None:
        self._model = model
        self._replay = replay
        self._memory = memory
        self._stds = stds
        self._seed = seed
        self._metric = metric
        self._masks = [position_mask(model, batch) for batch in replay.batches]
        pairs = zip(replay.clean, self._masks, strict=True)
        self._count = sum(positions(clean, mask) for clean, mask in pairs)

    def run(
        self, variants: Sequence[Variant], deadline: float = math.inf, progress: bool = False
    ) -> Iterator[list[tuple[Variant, float]]]:
        """The variants' disagreements, a chunk at a time, in the order of the blocks.

        Args:
            variants: what to probe.
            deadline: by `time.monotonic`; no chunk is begun after it.
            progress: show a bar on stderr.

        Raises:
            ValueError: a variant's output is NaN or infinite, or its module never runs.
        """
        replay = self._replay
        groups: dict[int, list[Variant]] = {}
        for variant in variants:
            groups.setdefault(replay.position(variant.target.block), []).append(variant)
        depth = len(replay.order) + 1
        with tqdm(
            total=sum((depth - position) * len(group) for position, group in groups.items()),
            desc="probing",
            disable=not progress,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
        ) as bar:
            for position, group in sorted(groups.items()):
                for chunk in self._chunks(group):
                    if time.monotonic() > deadline:
                        return
                    replay.advance(position, self._memory.record)
                    values = self._probe(chunk)
                    for variant, value in zip(chunk, values, strict=True):
                        self._check(variant, value)
                    yield list(zip(chunk, values, strict=True))
                    bar.update((depth - position) * len(chunk))

    def _check(self, variant: Variant, value: float) -> None:
        target, name, trial = variant.target, variant.target.name, variant.trial
        if not math.isfinite(value):
            raise ValueError(
                f"the output is {value} when {name} is perturbed (trial {trial}); look for NaN in "
                "the model's weights and outputs, or for overflow (try dtype=torch.float32)"
            )
        if value or self._replay.routes[name] != NEVER_CALLED:
            return
        others = alternatives(self._model, target.path)
        if not any(t.path in others and self._replay.reached(t.name) for t in self._replay.targets):
            raise ValueError(
                f"target_modules: {name} has no effect: its forward is never called and its weight "
                "never read; leave it out"
            )

    def _chunks(self, variants: Sequence[Variant]) -> Iterator[list[Variant]]:
        """Variants whose noise is held together, module by module; a one-by-one module apart."""
        routes = self._replay.routes
        chunk: list[Variant] = []
        held = 0
        for variant in sorted(variants, key=lambda v: routes[v.target.name] != FOLDED):
            folded = routes[variant.target.name] == FOLDED
            size = noise_bytes(variant.target, folded)
            if chunk and (held + size > self._memory.noise or not folded):
                yield chunk
                chunk, held = [], 0
            chunk.append(variant)
            held += size
        if chunk:
            yield chunk

    def _probe(self, chunk: Sequence[Variant]) -> list[float]:
        """The disagreement of each variant; one by one where folding turns out to be wrong."""
        replay = self._replay
        if replay.routes[chunk[0].target.name] != FOLDED and len(chunk) > 1:
            return [value for variant in chunk for value in self._probe([variant])]
        folded = replay.routes[chunk[0].target.name] == FOLDED
        noise = _Noise(chunk, self._stds, self._seed, folded)
        sums = torch.zeros(len(chunk), dtype=torch.float64)
        try:
            for index in range(len(replay.batches)):
                sums += self._probe_batch(index, chunk, noise).cpu()
        except _Unfoldable as error:
            replay.routes[error.target.name] = BY_CONTENT
            others = [v for v in chunk if v.target is not error.target]
            found = dict(zip(others, self._probe(others), strict=True)) if others else {}
            return [found[v] if v in found else self._probe([v])[0] for v in chunk]
        return (sums / self._count).tolist()

    def _probe_batch(self, index: int, chunk: Sequence[Variant], noise: _Noise) -> Tensor:
        """[variants of the chunk] float64: disagreement summed over the positions of one batch.

        Hidden states wait for each other before they meet the head, as every comparison multiplies
        those of the clean pass, too.
        """
        replay = self._replay
        clean = replay.clean[index]
        parts: list[Tensor] = []
        waiting: list[Tensor] = []
        runs = math.ceil(len(chunk) / folds_for(replay, index, self._memory))
        step = math.ceil(len(chunk) / runs)  # of one size: a few variants alone are slow
        room = (self._memory.activations - step * replay.live[index] * 5 // 4) // 2  # joined: twice
        for start in range(0, len(chunk), step):
            some = range(start, min(start + step, len(chunk)))
            outputs = self._outputs(index, chunk, noise, some)
            if outputs.isnan().any() and not clean.isnan().any() and replay.keep_everything():
                outputs = self._outputs(index, chunk, noise, some)
            waiting.append(outputs)
            more = some.stop < len(chunk) and sum(map(len, waiting)) + step <= COMPARED
            if replay.head is None or not more or (len(waiting) + 1) * outputs.nbytes > room:
                outputs = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
                waiting = []
                # on a GPU more than the kernels take at once would go without them
                for piece in outputs.split(COMPARED if outputs.is_cuda else len(outputs)):
                    sums = disagreement_sums(
                        piece, clean, self._masks[index], self._metric, replay.head
                    )
                    parts.append(sums.sum(1))
        return torch.cat(parts)

    def _outputs(self, index: int, chunk: Sequence[Variant], noise: _Noise, some: range) -> Tensor:
        """[K, B, ...] outputs of some variants of the chunk."""
        replay = self._replay
        if replay.routes[chunk[0].target.name] != FOLDED:
            return replay.run(index, 1, {}, noise.parameters(chunk[0].target))
        wraps = {
            target.module: _perturbed(
                target,
                *noise.of(target, some),
                folds=len(some),
                rows=len(some) * replay.rows(target.name, index),
            )
            for target in dict.fromkeys(chunk[k].target for k in some)
        }
        return replay.run(index, len(some), wraps)


def folds_for(replay: Replay, index: int, memory: Memory) -> int:
    """How many variants to fold into batch `index`."""
    device_type = replay.clean[index].device.type
    by_tokens = FOLDED_TOKENS.get(device_type, 65536) // max(replay.tokens(index), 1)
    # Products that are reused and those that are new are put together: a quarter more (measured).
    return max(1, min(by_tokens, memory.activations // max(replay.live[index] * 5 // 4, 1)))


def noise_bytes(target: Target, folded: bool = True) -> int:
    """The noise of one variant's weight."""
    weight = target.weight
    narrow = folded and isinstance(weight, Tensor) and weight.is_floating_point()
    size = weight.element_size() if narrow else 4
    return size * target.in_features * target.out_features


class _Noise:
    """The noise of a chunk, scaled, one tensor a module: drawn once for all batches."""

    def __init__(self, chunk: Sequence[Variant], stds: Stds, seed: int, folded: bool) -> None:
        self._first: dict[Target, int] = {}
        self._weights: dict[Target, Tensor] = {}
        self._biases: dict[Target, Tensor | None] = {}
        for index, variant in enumerate(chunk):
            self._first.setdefault(variant.target, index)
        for target in self._first:
            trials = [variant.trial for variant in chunk if variant.target is target]
            weight, bias = target.weight, target.bias
            assert isinstance(weight, Tensor)
            # A product takes noise of its own type; a perturbed copy is rounded after the sum.
            narrow = folded and weight.is_floating_point()
            dtype = weight.dtype if narrow else torch.float32
            of_weight, of_bias = stds[target.name]
            keys = [noise_key(seed, target.name, "weight", trial) for trial in trials]
            self._weights[target] = _stack(
                keys, weight_shape(target), of_weight, dtype, weight.device
            )
            keys = [noise_key(seed, target.name, "bias", trial) for trial in trials]
            self._biases[target] = (
                None if bias is None else _stack(keys, bias.shape, of_bias, dtype, weight.device)
            )

    def of(self, target: Target, some: range) -> tuple[slice, Tensor, Tensor | None]:
        """Which of the variants `some` perturb `target`; their noise [k, in, out] and [k, out]."""
        first, weights, biases = self._first[target], self._weights[target], self._biases[target]
        start, stop = max(some.start, first), min(some.stop, first + len(weights))
        mine = slice(start - first, stop - first)
        weights = weights[mine]
        if isinstance(target.module, nn.Linear):  # Conv1D stores [in, out]
            weights = weights.transpose(1, 2)
        place = slice(start - some.start, stop - some.start)
        return place, weights, None if biases is None else biases[mine]

    def parameters(self, target: Target) -> dict[str, Tensor]:
        """Perturbed copies of the parameters of a chunk's only variant."""
        weight, bias = target.weight, target.bias
        noise, of_bias = self._weights[target][0], self._biases[target]
        assert isinstance(weight, Tensor)
        if not target.parameter and is_packed(target.module):
            raise ValueError(
                f"{target.name} is quantised and cannot be probed in a folded batch; leave it out "
                "of target_modules or load it in a floating-point type"
            )
        parameters = {target.weight_path: (weight + noise).to(weight.dtype)}
        if bias is not None and of_bias is not None:
            parameters[f"{target.path}.bias"] = (bias + of_bias[0]).to(bias.dtype)
        return parameters


def _stack(
    keys: Sequence[int], shape: Sequence[int], std: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[len(keys), *shape]: the noise of each key, scaled."""
    out = torch.empty(len(keys), *shape, dtype=dtype, device=device)
    for row, key in zip(out, keys, strict=True):
        row.copy_(philox_normal(shape, key, device=device).mul_(std))
    return out


def _perturbed(
    target: Target,
    mine: slice,
    weights: Tensor,
    biases: Tensor | None,
    folds: int,
    rows: int,
) -> Callable[[Forward], Forward]:
    """Adds the noise's product, [k, in, out], to what the module returns for variants `mine`."""

    def wrap(original: Forward) -> Forward:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if x.shape[0] != rows:
                raise _Unfoldable(target)
            y = original(x, *args, **kwargs).contiguous()
            moved = y.view(folds, -1, y.shape[-1])[mine]
            variants = x.reshape(folds, -1, x.shape[-1])[mine]
            moved.baddbmm_(variants.to(y.dtype), weights.to(y.dtype))
            if biases is not None:
                moved += biases.to(y.dtype)[:, None]
            return y

        return forward

    return wrap


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

    def draw(parameter: Tensor, part: str) -> Tensor:
        key = noise_key(seed, name, part, trial)
        noise = philox_normal(parameter.shape, key, device=parameter.device)
        return noise.mul_(_std(parameter))

    if linear_shape(module) is None:
        return draw(plain_weight(module, name.rpartition(".")[2]), "weight"), None
    bias = getattr(module, "bias", None)
    return draw(plain_weight(module), "weight"), None if bias is None else draw(bias, "bias")
