"""Find decisions that a model takes on numbers, such as comparisons and sorts.

A comparison has no gradient and turns NaN into False. So a search with gradients or NaN for the
readers of a tensor misses comparisons, and is valid only if there are none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from adarank_fast.models.forward_patching import Forward, ForwardPatches
from adarank_fast.models.torch_private import TorchDispatchMode, leaves

# Their results hold numbers about the random state beside the output.
NO_DECISIONS = ("attention", "dropout")
PASS_OVER_NAN = ("nan", "fmax", "fmin")

Read = Callable[[ForwardPatches], Tensor]


def decides(read: Read, perturbed: Iterable[nn.Module]) -> bool:
    """Whether a pass turns values that depend on these modules into anything but real numbers.

    Truth values, indices, counts and Python numbers are meant: what is computed next may depend on
    them. Functions that skip NaN count as well.

    Args:
        read: runs the model with some modules' forwards patched.
        perturbed: the modules.
    """
    watch = _Decisions()

    def mark(original: Forward) -> Forward:
        def forward(*args: object, **kwargs: object) -> object:
            output = original(*args, **kwargs)
            watch.mark(output, 0)
            return output

        return forward

    with watch:
        read(ForwardPatches(dict.fromkeys(perturbed, mark)))
    return watch.found


def decides_late(read: Read, blocks: Sequence[nn.Module]) -> bool:
    """Whether a decision depends on a block's output in another way than through the next block.

    Args:
        read: runs the model with some modules' forwards patched.
        blocks: in the order in which they run.
    """
    watch = _Decisions()

    def mark(number: int, original: Forward) -> Forward:
        def forward(*args: object, **kwargs: object) -> object:
            watch.first = number  # the one before may be read
            output = original(*args, **kwargs)
            watch.first = number + 1
            watch.mark(output, number + 1)
            return output

        return forward

    with watch:
        read(ForwardPatches({block: partial(mark, i) for i, block in enumerate(blocks)}))
    return watch.found


class _Decisions(TorchDispatchMode):
    """Follows marked tensors through every operation.

    Attributes:
        first: decisions on what has this mark or a higher one do not count; None: all count.
        found: whether one counted.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.first: int | None = None
        self.found = False
        # by the id of a storage, as long as it lives: the mark
        self._marks: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def mark(self, tree: object, number: int) -> None:
        for leaf in leaves(tree):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                alive = weakref.ref(storage, partial(self._forget, id(storage)))
                self._marks[id(storage)] = number, alive

    def _forget(self, key: int, _: object) -> None:
        self._marks.pop(key, None)

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        given = [id(x.untyped_storage()) for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        marks = [self._marks[key][0] for key in given if key in self._marks]
        output = func(*args, **kwargs)
        if marks:
            earliest, name = min(marks), str(func)
            numbers = all(
                isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
                for x in leaves(output)
            )
            if any(part in name for part in PASS_OVER_NAN) or not (
                numbers or any(part in name for part in NO_DECISIONS)
            ):
                self.found |= self.first is None or earliest < self.first
            self.mark(output, earliest)
        return output
