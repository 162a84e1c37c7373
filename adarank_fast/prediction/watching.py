"""Watch a model run on a batch: which modules ran in which order, on what, and what they gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from adarank_fast.models.batches import Batch
from adarank_fast.models.forward_patching import Forward, ForwardPatches
from adarank_fast.models.outputs import OutputReader
from adarank_fast.models.targets import Target
from adarank_fast.models.torch_private import leaves, version


class Pass:
    """What one pass over a batch shows."""

    def __init__(self, keep: bool) -> None:
        self.output: Tensor
        self.order: list[str] = []
        self.tokens = 0  # most vectors that a target got in one call
        self.rows: dict[str, list[int]] = {}  # target -> rows of each call
        self.read_later: set[str] = set()
        self.fixed: set[nn.Module] = set()  # embeddings that no perturbation can change
        self.inputs: dict[str, list[Tensor]] = {}  # target -> the input of each call (if keep)
        self.returned: dict[nn.Module, list[Tensor]] = {}  # of blocks, embeddings (if keep)
        self._keep = keep
        self._called: set[nn.Module] = set()
        self._last: tuple[str, Tensor | None, int] | None = None

    def _keep_output(self, module: nn.Module, output: object) -> list[Tensor]:
        tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
        if self._keep:
            self.returned[module] = [tensor.clone() for tensor in tensors]
        return tensors

    def watch_block(self, path: str, module: nn.Module, original: Forward) -> Forward:
        """A forward that notes the blocks' order, and whose output the next one does not get."""

        def forward(*args: object, **kwargs: object) -> object:
            if self._last is not None:
                before, tensor, written = self._last
                passed_on = any(leaf is tensor for leaf in leaves((args, kwargs)))
                if tensor is None or not passed_on or version(tensor) != written:
                    self.read_later.add(before)
            self.order.append(path)
            output = original(*args, **kwargs)
            tensors = self._keep_output(module, output)
            first = tensors[0] if tensors else None
            self._last = path, first, 0 if first is None else version(first)
            return output

        return forward

    def watch_embeddings(self, module: nn.Module, original: Forward) -> Forward:
        """Fixed: called once, with whole numbers, before every block and target."""

        def forward(*args: object, **kwargs: object) -> object:
            given = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
            late = bool(self.order or self.rows or module in self._called)
            self._called.add(module)
            if late or any(x.is_floating_point() for x in given):
                self.fixed.discard(module)
            else:
                self.fixed.add(module)
            output = original(*args, **kwargs)
            self._keep_output(module, output)
            return output

        return forward

    def watch_target(self, name: str, original: Forward) -> Forward:
        """A forward that notes the rows of each call, and with `keep` its input."""

        def forward(*args: object, **kwargs: object) -> object:
            given = (x for x in leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim())
            if (x := next(given, None)) is not None:  # experts may take other things first
                self.rows.setdefault(name, []).append(x.shape[0])
                self.tokens = max(self.tokens, x.numel() // max(x.shape[-1], 1))
                if self._keep:
                    self.inputs.setdefault(name, []).append(x.clone())
            return original(*args, **kwargs)

        return forward


@dataclass(frozen=True)
class Watched:
    """The modules to watch in a pass."""

    reader: OutputReader
    targets: Sequence[Target]
    blocks: Mapping[str, nn.Module]
    embeddings: Sequence[nn.Module]

    def run(self, batch: Batch, keep: bool = False) -> Pass:
        """One pass; with copies of what goes into targets and out of blocks if `keep`."""
        seen = Pass(keep)
        patches = ForwardPatches(
            {target.module: partial(seen.watch_target, target.name) for target in self.targets},
            {module: partial(seen.watch_embeddings, module) for module in self.embeddings},
            # a block may itself be a target
            {block: partial(seen.watch_block, path, block) for path, block in self.blocks.items()},
        )
        seen.output = self.reader.read(batch, patches)
        return seen
