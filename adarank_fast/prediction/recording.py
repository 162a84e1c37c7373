"""Run a model on its batches unperturbed, and find out how each target may be probed.

`record_clean_passes` keeps the outputs that perturbed ones are compared with. It also decides what
a replay may rely on: the order of the blocks, what need not be computed again, and for each
target whether its variants can be folded into the batch, or why they cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from adarank_fast.errors import AdarankError
from adarank_fast.models.batches import Batch, batch_size
from adarank_fast.models.forward_patching import Forward, ForwardPatches
from adarank_fast.models.memory import LiveBytes, tokens
from adarank_fast.models.outputs import Output, OutputReader, accepted_part, rejection
from adarank_fast.models.targets import Target, find_blocks
from adarank_fast.prediction.dead_rows import Rows, find_needed_rows
from adarank_fast.prediction.decisions import decides, decides_late
from adarank_fast.prediction.folding import check_folding, find_routes
from adarank_fast.prediction.linear_cache import plain_linears
from adarank_fast.prediction.watching import Pass, Watched


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
        decides_late: whether the model decides on what an earlier block returned.
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
    decides_late: bool
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
    reader = OutputReader(model.get_submodule(output.root), output)
    sample = accepted_part(reader.read, max(batches, key=batch_size), 2)
    if skip_head:
        reader = replace(reader, head=_find_head(model, reader, targets, sample))
    blocks = {path: model.get_submodule(path) for path in find_blocks(model)}
    perturbed = {*blocks.values(), *(target.module for target in targets)}
    embeddings = list(_find_embeddings(reader.root, perturbed))
    watched = Watched(reader, targets, blocks, embeddings)

    longest = max(batches, key=lambda batch: tokens(batch) / batch_size(batch))
    passes: list[Pass] = []
    counted = LiveBytes()
    for batch in batches:
        try:
            with counted if batch is longest else nullcontext():  # counting takes time
                passes.append(watched.run(batch))
        except AdarankError:
            raise
        except Exception as error:  # any error of a model on inputs that it cannot take
            raise rejection(model, "a batch", batch, error) from error
    order = passes[0].order
    if len(set(order)) < len(order) or any(other.order != order for other in passes):
        order = []
    outputs, rows = [seen.output for seen in passes], [seen.rows for seen in passes]
    folding = check_folding(watched, sample, order)
    needed_rows: list[dict[nn.Module, Rows]] = [{} for _ in batches]
    if targets and order and reader.head is None:
        modules = {target.module for target in targets}
        needed_rows = _find_needed_rows(
            reader, blocks[order[-1]], modules, sample, batches, outputs
        )
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
        decides_late=len(order) > 2
        and decides_late(partial(reader.read, sample), [blocks[path] for path in order]),
        needed_rows=needed_rows,
        routes=find_routes(watched, folding, sample, rows),
    )


def _find_head(
    model: nn.Module, reader: OutputReader, targets: Sequence[Target], sample: Batch
) -> nn.Module | None:
    """The head that need not run: a plain Linear, not a target, whose output is the logits."""
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


def _find_needed_rows(
    reader: OutputReader,
    last: nn.Module,
    perturbed: set[nn.Module],
    sample: Batch,
    batches: Sequence[Batch],
    outputs: Sequence[Tensor],
) -> list[dict[nn.Module, Rows]]:
    """Per batch, rows of the last block's linear layers that the output reads.

    A layer that needs every row of `sample` is not tried on the batches.
    """

    def find(batch: Batch, linears: Sequence[nn.Module], output: Tensor) -> dict[nn.Module, Rows]:
        return find_needed_rows(partial(reader.read, batch), last, linears, output)

    linears = list(find(sample, plain_linears(last), reader.read(sample)))
    if linears and decides(partial(reader.read, sample), perturbed):
        linears = []
    pairs = zip(batches, outputs, strict=True)
    return [find(batch, linears, output) if linears else {} for batch, output in pairs]
