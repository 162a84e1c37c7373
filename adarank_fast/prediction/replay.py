"""Run a model for K variants at once, and compute only what they change.

Perturbing a module cannot change what was computed before it. So the blocks before the probed one
return what they returned in the clean pass, and the model's own code does all the rest: masks,
norms, heads. The K variants are folded into the batch, variant by variant: row k * B + b is item b
under variant k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from adarank_fast.models.batches import Batch, fold, repeat
from adarank_fast.models.forward_patching import (
    Forward,
    ForwardPatches,
    Patch,
    StopForward,
    stop_after,
    stop_before,
)
from adarank_fast.models.memory import LEAST
from adarank_fast.models.outputs import accepted
from adarank_fast.models.torch_private import leaves, map_leaves
from adarank_fast.prediction.linear_cache import LinearCache, plain_linears
from adarank_fast.prediction.recording import CleanPasses


class Replay:
    """Runs variants of a model from one block on, the open block; at first the whole model.

    Block outputs are kept only if later code was seen to read them; the others are replaced by NaN.
    If the model reads one of these after all, its output is NaN. Then all are kept from there on,
    and the run is repeated. If the model decides on one, which hides a NaN, all are kept from the
    start.

    Args:
        clean: the clean passes over the batches.
        keep_all: keep every block's output from the start; for outputs that could hide a NaN.
    """

    def __init__(self, clean: CleanPasses, keep_all: bool = False) -> None:
        self.clean = clean
        self._keep_all = keep_all or clean.decides_late
        self._blocks = list(clean.blocks.items())
        self._position = -1  # of the open block; -1: none was opened
        self._returned: list[dict[nn.Module, object]] = [{} for _ in clean.batches]  # by blocks
        self._linears: list[LinearCache] = []  # of the open block, a batch each
        self._embeddings = self._store_embeddings()

    def advance(self, position: int, most: float = math.inf) -> None:
        """Open the block at this position: those before it return what they returned.

        Args:
            position: of the block, in `clean.blocks`.
            most: bytes to keep on the device: of what blocks return (beyond it, in host memory),
                and of what the open block's linear layers read and return (beyond it, they
                compute it again).
        """
        if position < self._position:
            self._forget()
        if position == self._position or not self._blocks:
            return
        before, (_, opened) = self._blocks[:position], self._blocks[position]
        self._linears = [LinearCache() for _ in self.clean.batches]
        left = most
        for index, batch in enumerate(self.clean.batches):
            returned, linears = self._returned[index], self._linears[index]
            offload = self._device_bytes() > most
            self._run_until_stopped(
                batch,
                self._returning([block for block in before if block[1] in returned], index, 1),
                {m: partial(_store, returned, offload, m) for _, m in before if m not in returned},
                {m: partial(linears.fill, m) for m in plain_linears(opened) if left > 0},
                {opened: partial(_store, returned, offload, opened)},
                {opened: stop_after},
            )
            left -= linears.close()
            for path, block in before[:-1]:
                if not (self._keep_all or path in self.clean.read_later):
                    returned[block] = map_leaves(StoredTensor, StoredTensor.blank, returned[block])
        self._position = position

    def run(
        self,
        index: int,
        folds: int,
        perturbations: Mapping[nn.Module, Patch],
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The output of batch `index` under `folds` variants, from the open block on.

        Args:
            index: which batch.
            folds: K, how often the batch is folded.
            perturbations: module -> a patch of its forward, whose output is not referred to
                elsewhere; inputs have K * B rows, variant by variant.
            parameters: parameter names (in the model) -> replacements, for this call only.

        Returns:
            [K, B, ...] tensor.
        """
        batch = fold(self.clean.batches[index], folds)
        patches = self._patches(index, folds, perturbations, bool(parameters))
        value = self.clean.reader.read(batch, patches, parameters)
        if self._position > 0 and not self._keep_all and value.isnan().any():
            if not self.clean.outputs[index].isnan().any():
                self._keep_all, position = True, self._position
                self._forget()
                self.advance(position)
                return self.run(index, folds, perturbations, parameters)
        unfolded: Tensor = value.unflatten(0, (folds, -1))
        return unfolded

    def _patches(
        self, index: int, folds: int, perturbations: Mapping[nn.Module, Patch], replaced: bool
    ) -> ForwardPatches:
        """All that a run puts on top of modules' own forwards, in this order.

        1. Blocks before the open one return what they returned.
        2. Embeddings return what they returned.
        3. Linear layers of the last block compute the rows that the output reads.
        4. Linear layers of the open block compute the variants whose input has changed, through 3.
        5. Perturbed modules add the product of their noise to what they have by then.

        The reader's patch of the head comes last. With replaced parameters 2 to 4 are left out:
        they know the layers with their own parameters only.
        """
        blocks = self._returning(self._blocks[: max(self._position, 0)], index, folds)
        if replaced:
            return ForwardPatches(blocks, perturbations)
        repeated = self.clean.embeddings
        return ForwardPatches(
            blocks,
            {
                m: partial(_return, x, repeated[m], folds)
                for m, x in self._embeddings[index].items()
            },
            {m: rows.only for m, rows in self.clean.needed_rows[index].items()},
            self._linears[index].patches(folds) if self._linears else {},
            perturbations,
        )

    def _returning(
        self, blocks: Sequence[tuple[str, nn.Module]], index: int, folds: int
    ) -> dict[nn.Module, Patch]:
        """These blocks return what they returned for batch `index`."""
        returned, repeated = self._returned[index], self.clean.repeated
        return {
            block: partial(_return, returned[block], repeated.get(path, []), folds)
            for path, block in blocks
        }

    def _store_embeddings(self) -> list[dict[nn.Module, object]]:
        """What the embeddings return, a batch each, unless it is much."""
        stored: list[dict[nn.Module, object]] = [{} for _ in self.clean.batches]
        if self._blocks and self.clean.embeddings:
            for batch, returned in zip(self.clean.batches, stored, strict=True):
                patches = {m: partial(_store, returned, False, m) for m in self.clean.embeddings}
                self._run_until_stopped(batch, patches, {self._blocks[0][1]: stop_before})
        size = sum(x.nbytes for x in _stored_tensors(stored))
        return stored if size <= LEAST else [{} for _ in stored]

    def _run_until_stopped(self, batch: Batch, *patches: Mapping[nn.Module, Patch]) -> None:
        root = self.clean.reader.root
        with suppress(StopForward), ForwardPatches(*patches).applied():
            root(**accepted(root, batch))

    def _forget(self) -> None:
        self._position = -1
        self._returned = [{} for _ in self.clean.batches]
        self._linears = []

    def _device_bytes(self) -> int:
        """Of what blocks returned, held where they returned it."""
        return sum(x.nbytes for x in _stored_tensors(self._returned) if not x.offloaded)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a module returned.

    Attributes:
        tensor: a copy, as the model may go on to change its own in place; or NaN of its shape and
            no storage.
        device: where the module returned it.
    """

    tensor: Tensor
    device: torch.device

    @staticmethod
    def of(tensor: Tensor, offload: bool) -> StoredTensor:
        """A copy, on the CPU if `offload`; it remembers the tensor's own device."""
        copy = tensor.to("cpu" if offload else tensor.device, copy=True)
        return StoredTensor(copy, tensor.device)

    @property
    def offloaded(self) -> bool:
        """Whether the copy lies elsewhere than the tensor did."""
        return self.tensor.device != self.device

    @property
    def nbytes(self) -> int:
        """Of the copy's whole storage."""
        return self.tensor.untyped_storage().nbytes()

    def blank(self) -> StoredTensor:
        """NaN instead; numbers that are no floating-point ones are kept."""
        if not self.tensor.is_floating_point():
            return self
        nan = self.tensor.new_full((), math.nan, device=self.device)
        return StoredTensor(nan.expand(self.tensor.shape), self.device)

    def folded(self, folds: int) -> Tensor:
        """A copy, `folds` times on top of one another."""
        tensor = self.tensor
        if folds > 1 and tensor.dim() and not any(tensor.stride()):  # blank
            return tensor.as_strided((folds * tensor.shape[0], *tensor.shape[1:]), tensor.stride())
        tensor = tensor.to(self.device)
        return repeat(tensor, folds) if folds > 1 else tensor.clone()


def _stored_tensors(returned: Sequence[Mapping[nn.Module, object]]) -> list[StoredTensor]:
    tensors = leaves([list(trees.values()) for trees in returned])
    return [x for x in tensors if isinstance(x, StoredTensor)]


def _store(
    returned: dict[nn.Module, object], offload: bool, module: nn.Module, original: Forward
) -> Forward:
    """A forward that keeps what the module returns under `returned[module]`."""

    def forward(*args: object, **kwargs: object) -> object:
        output = original(*args, **kwargs)
        returned[module] = map_leaves(Tensor, lambda t: StoredTensor.of(t, offload), output)
        return output

    return forward


def _return(tree: object, repeated: list[bool], folds: int, _: Forward) -> Forward:
    """A forward that returns a stored output, folded; always a copy, as models write in place.

    Args:
        tree: with `StoredTensor` for tensors.
        repeated: for each of them, whether it has a row per item; if empty, all have.
        folds: K.
    """

    def forward(*args: object, **kwargs: object) -> object:
        flags = iter(repeated)
        return map_leaves(StoredTensor, lambda x: x.folded(folds if next(flags, True) else 1), tree)

    return forward
