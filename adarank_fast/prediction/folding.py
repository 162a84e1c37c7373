"""Find out for which targets variants can be folded into the batch, and what a fold repeats.

Nothing is known of the architecture: a small batch is run on its own and twice over, and the two
are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from adarank_fast.errors import AdarankError
from adarank_fast.models.batches import Batch, batch_size, fold, take
from adarank_fast.models.forward_patching import ForwardPatches, TensorForward
from adarank_fast.models.targets import Target
from adarank_fast.prediction.tolerance import is_same, is_twice, rounding
from adarank_fast.prediction.watching import Pass, Watched

# Routes: how a target's variants are run.
FOLDED = "folded"
NEVER_CALLED = "its forward is never called"
BY_CONTENT = "its rows depend on what the inputs hold"
ACROSS_ITEMS = "items of a batch change one another"
OF_EXPERTS = "a parameter of experts, not a module"


def rejected(error: Exception) -> str:
    """Of a model that cannot take a folded batch."""
    return f"the model rejects a folded batch ({type(error).__name__})"


@dataclass(frozen=True)
class Folding:
    """What comparing a small batch with the same batch folded twice shows.

    Attributes:
        items: of the small batch.
        first, single, double: passes over its first item, over all, over all twice.
        reason: why nothing can be folded; "" if that is not so.
        repeated, embeddings: as `CleanPasses` has them.
    """

    items: int
    first: Pass
    single: Pass
    double: Pass
    reason: str
    repeated: dict[str, list[bool]]
    embeddings: dict[nn.Module, list[bool]]

    def why_not(self, target: Target, rows: Sequence[Mapping[str, list[int]]]) -> str:
        """Why the target's variants must run one by one; "" if they need not.

        Args:
            target: which.
            rows: per batch, target name -> the rows of each call in the clean pass.
        """
        name = target.name
        if self.reason:
            return self.reason
        if target.parameter:
            return OF_EXPERTS
        if not any(name in calls for calls in rows):
            return NEVER_CALLED
        if name not in self.single.rows:  # what the items hold decides whether it is called
            return BY_CONTENT
        both = zip(self.first.rows.get(name, []), self.single.rows[name], strict=False)
        if any(all_items not in (one, self.items * one) for one, all_items in both):
            return BY_CONTENT
        ones, twos = self.single.inputs.get(name, []), self.double.inputs.get(name, [])
        if len(ones) != len(twos) or not all(map(is_twice, twos, ones)):
            return "the batch is not the first dimension of its input"
        if any(len(set(calls.get(name, ()))) != 1 for calls in rows):
            return "its calls differ in size"
        return ""


def check_folding(watched: Watched, sample: Batch, order: Sequence[str]) -> Folding:
    """How the model takes several copies of a batch in one pass, found with `sample`.

    Raises:
        AdarankError: the model gives another output when it is run again.
    """
    single = watched.run(sample, keep=True)
    repeated: dict[str, list[bool]] = {}
    embeddings: dict[nn.Module, list[bool]] = {}
    reason, first, double = "", single, single
    try:
        first = watched.run(take(sample, 1))
        double = watched.run(fold(sample, 2), keep=True)
    except Exception as error:  # any error of a model on a batch it cannot take
        reason = rejected(error)
    else:
        if not is_twice(double.output, single.output, rounding(watched.reader.root)):
            reason = "a folded batch gives another output"
        elif double.order != single.order:
            reason = "a folded batch runs other blocks"
    same = (
        double is not single
        and is_twice(double.output, single.output, 1e-4)
        and is_same(first.output, single.output[: len(first.output)], 1e-4)
    )
    if not same and not is_same(watched.run(sample).output, single.output, 1e-4):
        raise AdarankError(
            "the model gives another output when it is run again in eval mode; switch off what "
            "is random in its forward"
        )
    for path in () if reason else order:
        flags = _repeated(double, single, watched.blocks[path])
        repeated[path] = flags or []
        if flags is None:
            reason = f"block {path} does not give a row per item"
    for module in () if reason else single.fixed & double.fixed:
        if flags := _repeated(double, single, module):
            embeddings[module] = flags
    return Folding(batch_size(sample), first, single, double, reason, repeated, embeddings)


def find_routes(
    watched: Watched, folding: Folding, sample: Batch, rows: Sequence[Mapping[str, list[int]]]
) -> dict[str, str]:
    """Target name -> "folded", or why its variants must run one by one.

    Args:
        watched: with the targets.
        folding: what `check_folding` found.
        sample: the batch that it was found on.
        rows: per batch, target name -> the rows of each call in the clean pass.
    """
    routes = {t.name: folding.why_not(t, rows) or FOLDED for t in watched.targets}
    folded = [target for target in watched.targets if routes[target.name] == FOLDED]
    if folded and not _are_independent(watched, folded, sample, folding):
        routes |= {target.name: ACROSS_ITEMS for target in folded}
    return routes


def _are_independent(
    watched: Watched, targets: Sequence[Target], sample: Batch, folding: Folding
) -> bool:
    """Whether items stay as they are when these targets give other items other values.

    A mean over the batch, say, is the same for a batch and its double, until their rows differ.
    """

    def change(rows: int, original: TensorForward) -> TensorForward:
        def forward(*args: object, **kwargs: object) -> Tensor:
            y = original(*args, **kwargs)
            if len(y) != 2 * rows:  # these depend on what the items hold
                return y
            return torch.cat([y[:rows], 1.5 * y[rows:]])

        return forward

    rows, clean = folding.single.rows, folding.single.output
    patches = ForwardPatches({t.module: partial(change, rows[t.name][0]) for t in targets})
    try:
        changed = watched.reader.read(fold(sample, 2), patches)[: len(clean)]
    except Exception:  # any error of a model on values that it cannot take
        return False
    return is_same(changed, clean, rounding(watched.reader.root))


def _repeated(double: Pass, single: Pass, module: nn.Module) -> list[bool] | None:
    """Which tensors of a module's output are repeated; None if others do not stay as they are."""
    twos, ones = double.returned[module], single.returned[module]
    flags = [is_twice(two, one) for two, one in zip(twos, ones, strict=False)]
    pairs = zip(flags, twos, ones, strict=False)
    same = all(twice or is_same(two, one) for twice, two, one in pairs)
    return flags if same and len(ones) == len(twos) else None
