"""Run the probes: every (module, trial) that is asked for, a block at a time.

Blocks outside, batches inside: noise is made once per (module, trial), in chunks, and only the
outputs of the blocks before the current one are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from adarank_fast.errors import AdarankError
from adarank_fast.models.forward_patching import Patch, TensorForward
from adarank_fast.models.memory import Memory
from adarank_fast.models.outputs import position_mask
from adarank_fast.models.targets import Target, alternatives
from adarank_fast.prediction.disagreement import disagreement_sums, positions
from adarank_fast.prediction.folding import BY_CONTENT, FOLDED, NEVER_CALLED, rejected
from adarank_fast.prediction.noise import Noise, Stds, Variant, noise_bytes
from adarank_fast.prediction.recording import CleanPasses
from adarank_fast.prediction.replay import Replay

FOLDED_TOKENS = {"cpu": 2048, "cuda": 65536}  # rows of a folded batch, beyond which nothing is won

# Blocks whose variants together are little work for a GPU are probed in one forward: their kernels
# would wait for Python, which needs about a millisecond a block. Little are rows that do not fill
# the multiprocessors, or as many products as these are built for in a millisecond (by data sheets,
# by the bytes of an element). Not by the clock, as the same call must give the same bits.
ROWS_PER_MULTIPROCESSOR = 128
PRODUCTS_PER_MULTIPROCESSOR = {2: 1 << 32, 4: 1 << 28}

COMPARED = 15  # variants at once beside the clean pass: as many as the kernels take


class _Unfoldable(Exception):
    """A target was given other rows than folding the batch should give it."""

    def __init__(self, target: Target) -> None:
        self.target = target


class Prober:
    """Measures how far perturbed outputs are from the clean passes that `replay` starts from.

    Attributes:
        routes: target name -> "folded", or why its variants run one by one. At first as the clean
            passes showed it; what turns out not to fold in a probe is changed here.

    Args:
        model: unwrapped, inside `undisturbed`.
        replay: of that model; for this prober alone, which moves it from block to block.
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
        self.routes = dict(replay.clean.routes)
        self._model = model
        self._replay = replay
        self._clean = replay.clean
        self._memory = memory
        self._stds = stds
        self._seed = seed
        self._metric = metric
        self._masks = [position_mask(model, batch) for batch in self._clean.batches]
        pairs = zip(self._clean.outputs, self._masks, strict=True)
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
            AdarankError: a variant's output is NaN or infinite, or its module never runs.
        """
        groups = list(self._groups(variants))
        depth = len(self._clean.blocks) + 1
        with tqdm(
            total=sum((depth - self._position(group[0])) * len(group) for group in groups),
            desc="probing",
            disable=not progress,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
        ) as bar:
            for group in groups:
                for chunk in self._chunks(group):
                    if time.monotonic() > deadline:
                        return
                    self._replay.advance(self._position(chunk[0]), self._memory.linear_cache)
                    values = self._probe(chunk)
                    for variant, value in zip(chunk, values, strict=True):
                        self._check(variant, value)
                    yield list(zip(chunk, values, strict=True))
                    bar.update((depth - self._position(group[0])) * len(chunk))

    def _position(self, variant: Variant) -> int:
        """Of the block that the variant's target is in."""
        return self._clean.position(variant.target.block)

    def _groups(self, variants: Sequence[Variant]) -> Iterator[list[Variant]]:
        """The variants of a block; of several, in their order, where these are little for a GPU."""
        clean = self._clean
        rows = joined_rows(clean.outputs[0].device, *block_size([*clean.blocks.values()]))
        folds = (folds_for(clean, index, self._memory) for index in range(len(clean.batches)))
        most = min(rows // max(*clean.tokens, 1), *folds)
        group: list[Variant] = []
        for _, block in groupby(sorted(variants, key=self._position), key=self._position):
            more = list(block)
            if group and (
                len(group) + len(more) > most or not all(map(self._folds, [*group, *more]))
            ):
                yield group
                group = []
            group += more
        if group:
            yield group

    def _check(self, variant: Variant, value: float) -> None:
        target, name, trial = variant.target, variant.target.name, variant.trial
        if not math.isfinite(value):
            raise AdarankError(
                f"the output is {value} when {name} is perturbed (trial {trial}); look for NaN in "
                "the model's weights and outputs, or for overflow (try dtype=torch.float32)"
            )
        if value or self.routes[name] != NEVER_CALLED:
            return
        clean, others = self._clean, alternatives(self._model, target.path)
        if not any(t.path in others and clean.is_reached(t.name) for t in clean.targets):
            raise AdarankError(
                f"target_modules: {name} has no effect: its forward is never called and its weight "
                "never read; leave it out"
            )

    def _chunks(self, variants: Sequence[Variant]) -> Iterator[list[Variant]]:
        """Variants whose noise is held together, module by module; a one-by-one module apart."""
        chunk: list[Variant] = []
        held = 0
        for variant in sorted(variants, key=lambda v: not self._folds(v)):
            folded = self._folds(variant)
            size = noise_bytes(variant.target, folded)
            if chunk and (held + size > self._memory.noise or not folded):
                yield chunk
                chunk, held = [], 0
            chunk.append(variant)
            held += size
        if chunk:
            yield chunk

    def _folds(self, variant: Variant) -> bool:
        return self.routes[variant.target.name] == FOLDED

    def _probe(self, chunk: Sequence[Variant]) -> list[float]:
        """The disagreement of each variant; one by one where folding turns out to be wrong."""
        folded = self._folds(chunk[0])
        if not folded and len(chunk) > 1:
            return [value for variant in chunk for value in self._probe([variant])]
        noise = Noise(chunk, self._stds, self._seed, folded)
        sums = torch.zeros(len(chunk), dtype=torch.float64)
        try:
            for index in range(len(self._clean.batches)):
                sums += self._probe_batch(index, chunk, noise).cpu()
        except _Unfoldable as error:
            self.routes[error.target.name] = BY_CONTENT
            others = [v for v in chunk if v.target is not error.target]
            found = dict(zip(others, self._probe(others), strict=True)) if others else {}
            return [found[v] if v in found else self._probe([v])[0] for v in chunk]
        except Exception as error:  # any error of a model on more rows than it was tried with
            if not folded:
                raise
            self.routes |= {v.target.name: rejected(error) for v in chunk}
            return self._probe(chunk)
        return (sums / self._count).tolist()

    def _probe_batch(self, index: int, chunk: Sequence[Variant], noise: Noise) -> Tensor:
        """[variants of the chunk] float64: disagreement summed over the positions of one batch.

        Hidden states wait for each other before they meet the head, as every comparison multiplies
        those of the clean pass, too.
        """
        clean, head = self._clean.outputs[index], self._clean.reader.head
        parts: list[Tensor] = []
        waiting: list[Tensor] = []
        runs = math.ceil(len(chunk) / folds_for(self._clean, index, self._memory))
        step = math.ceil(len(chunk) / runs)  # of one size: a few variants alone are slow
        running = step * self._clean.live_bytes[index] * 5 // 4
        room = (self._memory.activations - running) // 2  # joined: twice
        for start in range(0, len(chunk), step):
            some = range(start, min(start + step, len(chunk)))
            outputs = self._outputs(index, chunk, noise, some)
            waiting.append(outputs)
            more = some.stop < len(chunk) and sum(map(len, waiting)) + step <= COMPARED
            if head is None or not more or (len(waiting) + 1) * outputs.nbytes > room:
                outputs = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
                waiting = []
                # on a GPU more than the kernels take at once would go without them
                for piece in outputs.split(COMPARED if outputs.is_cuda else len(outputs)):
                    sums = disagreement_sums(piece, clean, self._masks[index], self._metric, head)
                    parts.append(sums.sum(1))
        return torch.cat(parts)

    def _outputs(self, index: int, chunk: Sequence[Variant], noise: Noise, some: range) -> Tensor:
        """[K, B, ...] outputs of some variants of the chunk."""
        if not self._folds(chunk[0]):
            return self._replay.run(index, 1, {}, noise.parameters(chunk[0].target))
        perturbations = {
            target.module: _perturbed(
                target,
                *noise.of(target, some),
                folds=len(some),
                rows=len(some) * self._clean.rows[index][target.name][0],
            )
            for target in dict.fromkeys(chunk[k].target for k in some)
        }
        return self._replay.run(index, len(some), perturbations)


def block_size(blocks: Sequence[nn.Module]) -> tuple[int, int]:
    """(parameters of the largest block, bytes of an element that blocks compute with)."""
    parameters = [[*block.parameters()] for block in blocks]
    floating = (p for some in parameters for p in some if p.is_floating_point())
    size = max((sum(p.numel() for p in some) for some in parameters), default=1)
    return size, next((p.element_size() for p in floating), 4)


def joined_rows(device: torch.device, parameters: int, itemsize: int) -> int:
    """Up to how many rows variants of several blocks are probed in one forward.

    Args:
        device: that runs them.
        parameters: of the largest block: so many products a row.
        itemsize: bytes of an element.
    """
    if device.type != "cuda":
        return 0  # a CPU is busy with a few rows
    products = PRODUCTS_PER_MULTIPROCESSOR.get(itemsize, 0)
    rows = max(ROWS_PER_MULTIPROCESSOR, products // max(parameters, 1))
    return rows * int(torch.cuda.get_device_properties(device).multi_processor_count)


def folds_for(clean: CleanPasses, index: int, memory: Memory) -> int:
    """How many variants to fold into batch `index`."""
    device_type = clean.outputs[index].device.type
    by_tokens = FOLDED_TOKENS.get(device_type, 65536) // max(clean.tokens[index], 1)
    # Stored products and new ones are put together: a quarter more (measured).
    return max(1, min(by_tokens, memory.activations // max(clean.live_bytes[index] * 5 // 4, 1)))


def _perturbed(
    target: Target,
    changed: slice,
    weights: Tensor,
    biases: Tensor | None,
    folds: int,
    rows: int,
) -> Patch:
    """Adds the noise's product, [k, in, out], to what the module returns for variants `changed`."""

    def patch(original: TensorForward) -> TensorForward:
        def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
            if x.shape[0] != rows:
                raise _Unfoldable(target)
            y = original(x, *args, **kwargs).contiguous()
            moved = y.view(folds, -1, y.shape[-1])[changed]
            variants = x.reshape(folds, -1, x.shape[-1])[changed]
            moved.baddbmm_(variants.to(y.dtype), weights.to(y.dtype))
            if biases is not None:
                moved += biases.to(y.dtype)[:, None]
            return y

        return forward

    return patch
