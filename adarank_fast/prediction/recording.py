"""Run a model on its batches unperturbed, and find out how each target may be probed.

`record_clean_passes` keeps the outputs that perturbed ones are compared with. It also decides what
a replay may rely on: the order of the blocks, what need not be computed again, and for each
target whether its variants can be folded into the batch, or why they cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adarank_fast.errors import AdarankError
from adarank_fast.models.batches import Batch, batch_size, fold, take
from adarank_fast.models.forward_patching import Forward, ForwardPatches
from adarank_fast.models.memory import LiveBytes, tokens
from adarank_fast.models.outputs import Output, OutputReader
from adarank_fast.models.targets import Target, find_blocks
from adarank_fast.models.torch_private import leaves, version
from adarank_fast.prediction.dead_rows import Rows, find_needed_rows
from adarank_fast.prediction.linear_cache import plain_linears
from adarank_fast.prediction.tolerance import is_same, is_twice, rounding

# Routes: how a target's variants are run.
FOLDED = "folded"
NEVER_CALLED = "its forward is never called"
BY_CONTENT = "its rows depend on what the inputs hold"
OF_EXPERTS = "a parameter of experts, not a module"


@dataclass(frozen=True)
class CleanPasses:
    """What the passes without a perturbation gave, and what may be relied on in a replay.

    Attributes:
        reader: runs the model.
        batches: as they were given.
        targets: the modules that will be perturbed.
        outputs: per batch, what the reader gave, [B, ...].
        live_bytes: per batch, the most bytes that a clean pass holds at one time, by what the one
            with the longest items holds for a position.
        tokens: per batch, the most vectors that a target got in one call.
        rows: per batch, target name -> the rows of each call.
        blocks: path -> module of the blocks that a replay may skip, in the order of execution.
        read_later: paths of the blocks whose output is not simply the next block's input.
        repeated: path of a block -> for each tensor that it returns, whether that has a row per
            item and so is repeated in a folded batch.
        embeddings: modules before everything that is perturbed -> the same of what they return.
        needed_rows: per batch, linear layers of the last block -> the rows that the output reads.
        routes: target name -> "folded", or why its variants must run one by one.
    """

    reader: OutputReader
    batches: Sequence[Batch]
    targets: Sequence[Target]
    outputs: list[Tensor]
    live_bytes: list[int]
    tokens: list[int]
    rows: list[dict[str, list[int]]]
    blocks: dict[str, nn.Module]
    read_later: set[str]
    repeated: dict[str, list[bool]]
    embeddings: dict[nn.Module, list[bool]]
    needed_rows: list[dict[nn.Module, Rows]]
    routes: dict[str, str]

    def position(self, block: str | None) -> int:
        """Where a block stands in `blocks`; 0, the whole forward, if it cannot be replayed."""
        return list(self.blocks).index(block) if block in self.blocks else 0

    def is_reached(self, name: str) -> bool:
        """Whether a target got any rows; experts may get none."""
        return any(sum(rows.get(name, ())) for rows in self.rows)


def record_clean_passes(
    model: nn.Module,
    output: Output,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    skip_head: bool = True,
) -> CleanPasses:
    """Run every batch once, and a small one a few times to see what may be relied on.

    Args:
        model: unwrapped, inside `undisturbed`.
        output: what to read off it.
        batches: as `prepare_batches` returns them.
        targets: the modules that will be perturbed.
        skip_head: look for a head that need not run (see `OutputReader`).

    Raises:
        AdarankError: a target lies outside what the output reads, or the model is not deterministic
            in eval mode.
    """
    for target in targets:
        if output.root and not target.path.startswith(f"{output.root}."):
            raise AdarankError(
                f"target_modules: {target.name} has no influence on output {output.name!r}; "
                "choose another output= or leave it out"
            )
    sample = take(max(batches, key=batch_size), 2)
    reader = OutputReader(model.get_submodule(output.root), output)
    if skip_head:
        reader = replace(reader, head=_find_head(model, reader, targets, sample))
    blocks = {path: model.get_submodule(path) for path in find_blocks(model)}
    perturbed = {*blocks.values(), *(target.module for target in targets)}
    embeddings = list(_find_embeddings(reader.root, perturbed))
    watched = _Watched(reader, targets, blocks, embeddings)

    longest = max(batches, key=lambda batch: tokens(batch) / batch_size(batch))
    passes: list[_Pass] = []
    for batch in batches:
        if batch is longest:  # counting takes time
            with LiveBytes() as counted:
                passes.append(watched.run(batch))
        else:
            passes.append(watched.run(batch))
    order = passes[0].order
    if len(set(order)) < len(order) or any(other.order != order for other in passes):
        order = []
    outputs, rows = [seen.output for seen in passes], [seen.rows for seen in passes]
    folding = _check_folding(watched, sample, order)
    needed_rows: list[dict[nn.Module, Rows]] = [{} for _ in batches]
    if targets and order and reader.head is None:
        needed_rows = _find_needed_rows(reader, blocks[order[-1]], sample, batches, outputs)
    return CleanPasses(
        reader=reader,
        batches=batches,
        targets=targets,
        outputs=outputs,
        live_bytes=[counted.peak * tokens(batch) // tokens(longest) for batch in batches],
        tokens=[seen.tokens or batch_size(b) for seen, b in zip(passes, batches, strict=True)],
        rows=rows,
        blocks={path: blocks[path] for path in order},
        read_later=set().union(*(seen.read_later for seen in passes)),
        repeated=folding.repeated,
        embeddings={
            module: repeated
            for module, repeated in folding.embeddings.items()
            if all(module in seen.fixed for seen in passes)
        },
        needed_rows=needed_rows,
        routes={t.name: folding.why_not(t, rows) or FOLDED for t in targets},
    )


def _find_head(
    model: nn.Module, reader: OutputReader, targets: Sequence[Target], sample: Batch
) -> nn.Module | None:
    """The head that need not run: a plain Linear, no target, that returns the very logits."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if reader.output.name != "logits" or type(head) is not nn.Linear:
        return None
    if any(target.module is head for target in targets):
        return None
    calls: list[Tensor] = []

    def keep_output(_: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            calls.append(type(head).forward(head, x))
            return calls[-1]

        return forward

    logits = reader.read(sample, ForwardPatches({head: keep_output}))
    same = len(calls) == 1 and calls[0].shape == logits.shape and torch.equal(calls[0], logits)
    return head if same else None


def _find_embeddings(root: nn.Module, perturbed: set[nn.Module]) -> Iterator[nn.Module]:
    """Topmost modules with embeddings and more (a norm, say), but nothing that is perturbed."""
    for child in root.children():
        inside = set(child.modules())
        embeds = any(isinstance(module, nn.Embedding) for module in inside)
        if embeds and len(inside) > 1:
            if inside & perturbed:
                yield from _find_embeddings(child, perturbed)
            else:
                yield child


class _Pass:
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

    def _keep_output(self, module: nn.Module, output: Any) -> list[Tensor]:
        tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
        if self._keep:
            self.returned[module] = [tensor.clone() for tensor in tensors]
        return tensors

    def watch_block(self, path: str, module: nn.Module, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
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

        def forward(*args: Any, **kwargs: Any) -> Any:
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
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = (x for x in leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim())
            if (x := next(given, None)) is not None:  # experts may take other things first
                self.rows.setdefault(name, []).append(x.shape[0])
                self.tokens = max(self.tokens, x.numel() // max(x.shape[-1], 1))
                if self._keep:
                    self.inputs.setdefault(name, []).append(x.clone())
            return original(*args, **kwargs)

        return forward


@dataclass(frozen=True)
class _Watched:
    """The modules to watch in a pass."""

    reader: OutputReader
    targets: Sequence[Target]
    blocks: Mapping[str, nn.Module]
    embeddings: Sequence[nn.Module]

    def run(self, batch: Batch, keep: bool = False) -> _Pass:
        """One pass; with copies of what goes into targets and out of blocks if `keep`."""
        seen = _Pass(keep)
        patches = ForwardPatches(
            {target.module: partial(seen.watch_target, target.name) for target in self.targets},
            {module: partial(seen.watch_embeddings, module) for module in self.embeddings},
            # a block may itself be a target
            {block: partial(seen.watch_block, path, block) for path, block in self.blocks.items()},
        )
        seen.output = self.reader.read(batch, patches)
        return seen


@dataclass(frozen=True)
class _Folding:
    """What comparing a small batch with the same batch folded twice shows.

    Attributes:
        items: of the small batch.
        first, single, double: passes over its first item, over all, over all twice.
        reason: why nothing can be folded; "" if that is not so.
        repeated, embeddings: as `CleanPasses` has them.
    """

    items: int
    first: _Pass
    single: _Pass
    double: _Pass
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
        both = zip(self.first.rows.get(name, []), self.single.rows.get(name, []), strict=False)
        if any(all_items not in (one, self.items * one) for one, all_items in both):
            return BY_CONTENT
        ones, twos = self.single.inputs.get(name, []), self.double.inputs.get(name, [])
        if len(ones) != len(twos) or not all(map(is_twice, twos, ones)):
            return "the batch is not the first dimension of its input"
        if any(len(set(calls.get(name, ()))) != 1 for calls in rows):
            return "its calls differ in size"
        return ""


def _check_folding(watched: _Watched, sample: Batch, order: Sequence[str]) -> _Folding:
    single, again = watched.run(sample, keep=True), watched.run(sample)
    if not is_same(again.output, single.output, 1e-4):
        raise AdarankError(
            "the model gives another output when it is run again in eval mode; switch off what "
            "is random in its forward"
        )
    first = watched.run(take(sample, 1))
    repeated: dict[str, list[bool]] = {}
    embeddings: dict[nn.Module, list[bool]] = {}
    reason, double = "", single
    try:
        double = watched.run(fold(sample, 2), keep=True)
    except Exception as error:  # whatever a model says to a batch it cannot take
        reason = f"the model rejects a folded batch ({type(error).__name__})"
    else:
        if not is_twice(double.output, single.output, rounding(watched.reader.root)):
            reason = "a folded batch gives another output"
        elif double.order != single.order:
            reason = "a folded batch runs other blocks"
    for path in () if reason else order:
        flags = _repeated(double, single, watched.blocks[path])
        repeated[path] = flags or []
        if flags is None:
            reason = f"block {path} does not give a row per item"
    for module in () if reason else single.fixed & double.fixed:
        if flags := _repeated(double, single, module):
            embeddings[module] = flags
    return _Folding(batch_size(sample), first, single, double, reason, repeated, embeddings)


def _repeated(double: _Pass, single: _Pass, module: nn.Module) -> list[bool] | None:
    """Which tensors of a module's output are repeated; None if others do not stay as they are."""
    twos, ones = double.returned[module], single.returned[module]
    flags = [is_twice(two, one) for two, one in zip(twos, ones, strict=False)]
    pairs = zip(flags, twos, ones, strict=False)
    same = all(twice or is_same(two, one) for twice, two, one in pairs)
    return flags if same and len(ones) == len(twos) else None


def _find_needed_rows(
    reader: OutputReader,
    last: nn.Module,
    sample: Batch,
    batches: Sequence[Batch],
    outputs: Sequence[Tensor],
) -> list[dict[nn.Module, Rows]]:
    """Per batch, rows of the last block's linear layers that the output reads.

    What no row of `sample` can be left out of is not tried on the batches.
    """

    def find(batch: Batch, linears: Sequence[nn.Module], output: Tensor) -> dict[nn.Module, Rows]:
        return find_needed_rows(partial(reader.read, batch), last, linears, output)

    linears = list(find(sample, plain_linears(last), reader.read(sample)))
    pairs = zip(batches, outputs, strict=True)
    return [find(batch, linears, output) if linears else {} for batch, output in pairs]
