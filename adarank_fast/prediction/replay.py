"""Record a clean pass over the batches; run what comes after a block for K variants at once.

Perturbing a module cannot change what was computed before it. So the blocks before the probed one
answer from a record, and the model's own code does all the rest: embeddings, masks, norms, heads.
The K variants of a block are folded into the batch, variant by variant: row k * B + b is item b
under variant k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map_only

from adarank_fast.models.batches import batch_size, fold, take
from adarank_fast.models.forward_patching import Forward, patched
from adarank_fast.models.memory import LEAST, LiveBytes, tokens
from adarank_fast.models.outputs import Batch, Output, accepted
from adarank_fast.models.targets import Target, find_blocks
from adarank_fast.prediction.dead_rows import Rows, find_unread
from adarank_fast.prediction.linear_cache import LinearRecord, plain_linears
from adarank_fast.prediction.recording import Recorded, Trace, answer, find_entrances, repeating
from adarank_fast.prediction.tolerance import is_same, is_twice, rounding

FOLDED = "folded"


NEVER_CALLED = "its forward is never called"


BY_CONTENT = "its rows depend on what the inputs hold"


OF_EXPERTS = "a parameter of experts, not a module"


Wrap = Callable[[Forward], Forward]


class _Reached(BaseException):
    """Raised where a pass may stop: everything up to the wanted block has been recorded."""


class Replay:
    """A model, its batches and a record of the clean pass, open at one block at a time.

    Attributes:
        targets: the modules that will be perturbed.
        head: the language-model head, if the output is exactly what it returns. Then it is never
            run: what `clean` and `run` hold is its input, hidden states [B, T, D].
        clean: per batch, the output of the clean pass, [B, ...].
        live: per batch, the most bytes that a clean pass holds at one time, by what the one with
            the longest items holds for a position.
        order: paths of the blocks that can answer from the record, in the order of execution.
        routes: target name -> "folded", or why its variants must run one by one.

    Args:
        model: unwrapped, inside `undisturbed`.
        output: what to read off it.
        batches: as `prepare_batches` returns them.
        targets: see above.
        everything: see `keep_everything`; for outputs that could hide a NaN.
        tap: look for a `head`.

    Raises:
        ValueError: a target lies outside what the output reads, or the model is not deterministic
            in eval mode.
    """

    def __init__(
        self,
        model: nn.Module,
        output: Output,
        batches: Sequence[Batch],
        targets: Sequence[Target],
        everything: bool = False,
        tap: bool = True,
    ) -> None:
        self.output = output
        self.batches = batches
        self.root = model.get_submodule(output.root)
        self.head: nn.Module | None = None
        self._prefix = f"{output.root}." if output.root else ""
        for target in targets:
            if not target.path.startswith(self._prefix):
                raise ValueError(
                    f"target_modules: {target.name} has no influence on output "
                    f"{output.name!r}; choose another output= or leave it out"
                )
        self._modules = {path: model.get_submodule(path) for path in find_blocks(model)}
        self.targets = targets
        self._everything = everything
        sample = take(max(batches, key=batch_size), 2)
        self.head = self._find_head(model, sample) if tap else None
        self._boundary, self._opened = 0, -1  # blocks that answer; the block whose linears do
        self._record: list[dict[str, Any]] = [{} for _ in batches]
        self._linears: list[LinearRecord] = []
        inner = {*self._modules.values(), *(target.module for target in targets)}
        self._entrances: dict[nn.Module, list[bool] | None] = dict.fromkeys(
            find_entrances(self.root, inner)
        )
        self._record_clean_passes()
        self._check_folding(sample)
        self._entered: list[dict[nn.Module, Any]] = [{} for _ in batches]
        self._record_entrances()
        self._read_rows: list[dict[nn.Module, Rows]] = [{} for _ in batches]
        if targets and self.order and self.head is None:
            self._find_unread(sample)

    def position(self, block: str | None) -> int:
        """Where a block stands in `order`; 0, the whole forward, if it cannot be replayed."""
        return self.order.index(block) if block in self.order else 0

    def advance(self, position: int, most: float = math.inf) -> None:
        """Open the record at `order[position]`: the blocks before it answer, the rest runs.

        Args:
            position: of the block, in `order`.
            most: bytes to keep on the device: of what blocks return (beyond it, in host memory),
                and of what the open block's linear layers read and return (beyond it, they
                compute it again).
        """
        if position < self._boundary:
            self._forget()
        if position == self._opened or not self.order:
            return
        before, path = self.order[:position], self.order[position]
        opened = self._modules[path]
        self._linears = [LinearRecord() for _ in self.batches]
        reusable = most
        for batch, record, linears in zip(self.batches, self._record, self._linears, strict=True):
            forwards = self._answers(record, [block for block in before if block in record], 1)
            offload = self._device_bytes() > most
            for block in before:
                if block not in record:
                    module = self._modules[block]
                    forwards[module] = _recorder(block, module.forward, record, offload)
            if reusable > 0:
                forwards |= {m: linears.recorder(m, m.forward) for m in plain_linears(opened)}
            original = forwards.get(opened, opened.forward)
            forwards[opened] = _stop_after(_recorder(path, original, record, offload))
            try:
                with patched(forwards):
                    self.root(**accepted(self.root, batch))
            except _Reached:
                pass
            reusable -= linears.close()
            for block in before[:-1]:
                if not (self._everything or block in self._needed):
                    record[block] = tree_map_only(Recorded, Recorded.blank, record[block])
        self._boundary = self._opened = position

    def _forget(self) -> None:
        self._boundary, self._opened = 0, -1
        self._record = [{} for _ in self.batches]
        self._linears = []

    def run(
        self,
        index: int,
        folds: int,
        wraps: Mapping[nn.Module, Wrap],
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The output of batch `index` under `folds` variants, from the open block on.

        Args:
            index: which batch.
            folds: K, how often the batch is folded.
            wraps: module -> what makes the forward to use of its own one, whose output is not
                referred to elsewhere; inputs have K * B rows, variant by variant.
            parameters: parameter names (in the model) -> replacements, for this call only.

        Returns:
            [K, B, ...] tensor.
        """
        inputs = fold(self.batches[index], folds)
        forwards = self._answers(self._record[index], self.order[: self._boundary], folds)
        if not parameters:
            entered = self._entered[index]
            forwards |= {m: answer(entered[m], self._entrances[m], folds) for m in entered}
            forwards |= {m: rows.only(m.forward) for m, rows in self._read_rows[index].items()}
            forwards |= self._linears[index].forwards(folds, forwards) if self._linears else {}
        for module, wrap in wraps.items():
            forwards[module] = wrap(forwards.get(module, module.forward))
        value = self._read(forwards, inputs, parameters)
        value = value[:, None] if value.dim() == 1 else value
        return value.reshape(folds, -1, *value.shape[1:])

    def keep_everything(self) -> bool:
        """Let every block answer with its real output from now on; False if that was so already.

        By default only outputs that are known to be read are kept; the rest answers with NaN, so
        that a model which reads an earlier block's output elsewhere shows it.
        """
        if self._everything or not self._boundary:
            return False
        self._everything = True
        position = self._boundary
        self._forget()
        self.advance(position)
        return True

    def reached(self, name: str) -> bool:
        """Whether a target got any rows in the clean passes; experts may get none."""
        return any(sum(rows.get(name, ())) for rows in self._rows)

    def rows(self, name: str, index: int) -> int:
        """Rows that a folded target gets for batch `index` in a clean pass."""
        return self._rows[index][name][0]

    def tokens(self, index: int) -> int:
        """Vectors that a target gets at most for batch `index` in a clean pass."""
        return self._tokens[index]

    def _read(
        self,
        forwards: Mapping[nn.Module, Forward],
        inputs: Batch,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The output, or the head's input, of one forward."""
        hidden: list[Tensor] = []

        def tap(x: Tensor) -> Tensor:
            hidden.append(x)
            raise _Reached

        arguments = accepted(self.root, inputs)
        try:
            with patched(forwards if self.head is None else {**forwards, self.head: tap}):
                if not parameters:
                    outputs = self.root(**arguments)
                else:
                    local = {k.removeprefix(self._prefix): v for k, v in parameters.items()}
                    outputs = functional_call(self.root, local, kwargs=arguments)
        except _Reached:
            return hidden[0]
        return self.output.read(outputs, inputs)

    def _find_head(self, model: nn.Module, sample: Batch) -> nn.Module | None:
        """The head to tap: a plain Linear, no target, that returns the very logits."""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if self.output.name != "logits" or type(head) is not nn.Linear:
            return None
        if any(target.module is head for target in self.targets):
            return None
        calls: list[Tensor] = []

        def record(x: Tensor) -> Tensor:
            calls.append(type(head).forward(head, x))
            return calls[-1]

        logits = self._read({head: record}, sample)
        same = len(calls) == 1 and calls[0].shape == logits.shape and torch.equal(calls[0], logits)
        return head if same else None

    def _trace(self, batch: Batch, keep: bool = False) -> tuple[Trace, Tensor]:
        trace = Trace(keep)
        forwards = {t.module: trace.target(t.name, t.module.forward) for t in self.targets}
        forwards |= {module: trace.entrance(module) for module in self._entrances}
        for path, module in self._modules.items():  # a block may itself be a target
            forwards[module] = trace.block(path, forwards.get(module, module.forward))
        value = self._read(forwards, batch)
        if not isinstance(value, Tensor) or not value.dim():
            raise ValueError(
                f"output {self.output.name!r} must give a tensor with a row per item, "
                f"got {type(value).__name__}"
            )
        if value.shape[0] != batch_size(batch):
            raise ValueError(
                f"output {self.output.name!r} must have a row per item "
                f"({batch_size(batch)}), got shape {tuple(value.shape)}"
            )
        return trace, value[:, None] if value.dim() == 1 else value

    def _record_clean_passes(self) -> None:
        self.clean: list[Tensor] = []
        self._rows: list[dict[str, list[int]]] = []
        self._tokens: list[int] = []
        orders, breaks, entrances = [], set(), self._entrances
        longest = max(self.batches, key=lambda batch: tokens(batch) / batch_size(batch))
        for batch in self.batches:
            if batch is longest:  # counting takes time
                with LiveBytes() as counted:
                    trace, value = self._trace(batch)
            else:
                trace, value = self._trace(batch)
            self.clean.append(value)
            self._rows.append(trace.rows)
            self._tokens.append(trace.tokens or batch_size(batch))
            orders.append(trace.order)
            breaks |= trace.breaks
            fit = trace.entered.keys() - trace.changeable
            entrances = {module: flags for module, flags in entrances.items() if module in fit}
        self.live = [counted.peak * tokens(batch) // tokens(longest) for batch in self.batches]
        once = len(set(orders[0])) == len(orders[0])
        self.order = orders[0] if once and all(o == orders[0] for o in orders) else []
        self._needed = breaks
        self._entrances = entrances

    def _record_entrances(self) -> None:
        """What the embeddings return, unless it is much: nothing that is perturbed changes it."""

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Reached

        first = {self._modules[path]: stop for path in self.order[:1]}
        for batch, entered in zip(self.batches, self._entered, strict=True):
            trees: dict[str, Any] = {}
            names = {module: str(i) for i, module in enumerate(self._entrances)}
            recorders = {m: _recorder(i, m.forward, trees, False) for m, i in names.items()}
            if first and recorders:
                with suppress(_Reached), patched(recorders | first):
                    self.root(**accepted(self.root, batch))
                entered |= {module: trees[i] for module, i in names.items()}
        trees_kept = [list(entered.values()) for entered in self._entered]
        kept = [x for x in tree_flatten(trees_kept)[0] if isinstance(x, Recorded)]
        if sum(x.nbytes for x in kept) > LEAST:
            self._entered = [{} for _ in self.batches]

    def _find_unread(self, sample: Batch) -> None:
        """Rows of the last block's linear layers to leave out; tried on a small batch first."""
        last = self._modules[self.order[-1]]
        linears = plain_linears(last)
        value = self._read({}, sample)
        linears = list(find_unread(lambda f: self._read(f, sample), last, linears, value))
        if linears:
            for index, (batch, clean) in enumerate(zip(self.batches, self.clean, strict=True)):

                def read(forwards: Mapping[nn.Module, Forward], batch: Batch = batch) -> Tensor:
                    value = self._read(forwards, batch)
                    return value[:, None] if value.dim() == 1 else value

                self._read_rows[index] = find_unread(read, last, linears, clean)

    def _check_folding(self, sample: Batch) -> None:
        """Compare a small batch with the same batch folded twice, target by target."""
        single, value = self._trace(sample, keep=True)
        again, second = self._trace(sample)
        if not is_same(second, value, 1e-4):
            raise ValueError(
                "the model gives another output when it is run again in eval mode; switch off what "
                "is random in its forward"
            )
        first, _ = self._trace(take(sample, 1))
        reason = ""
        try:
            double, folded_value = self._trace(fold(sample, 2), keep=True)
        except Exception as error:  # whatever a model says to a batch it cannot take
            reason = f"the model rejects a folded batch ({type(error).__name__})"
        else:
            if not is_twice(folded_value, value, rounding(self.root)):
                reason = "a folded batch gives another output"
            elif double.order != single.order:
                reason = "a folded batch runs other blocks"
        self._repeats: dict[str, list[bool]] = {}
        if not reason:
            for path in self.order:
                pairs = list(zip(double.outputs[path], single.outputs[path], strict=True))
                self._repeats[path] = [is_twice(two, one) for two, one in pairs]
                if not all(is_twice(two, one) or is_same(two, one) for two, one in pairs):
                    reason = f"block {path} does not give a row per item"
        traces = first, single, double
        self._entrances = {} if reason else repeating(self._entrances, single, double)
        self.routes = {
            name: reason or self._why_not_folded(name, batch_size(sample), *traces) or FOLDED
            for name in (target.name for target in self.targets)
        }

    def _why_not_folded(
        self, name: str, items: int, first: Trace, single: Trace, double: Trace
    ) -> str:
        if any(target.name == name and target.parameter for target in self.targets):
            return OF_EXPERTS
        ones, twos = single.inputs.get(name, []), double.inputs.get(name, [])
        if not any(name in rows for rows in self._rows):
            return NEVER_CALLED
        calls = zip(first.rows.get(name, []), single.rows.get(name, []), strict=False)
        if any(both not in (alone, items * alone) for alone, both in calls):
            return BY_CONTENT
        if len(ones) != len(twos) or not all(map(is_twice, twos, ones)):
            return "the batch is not the first dimension of its input"
        if any(len(set(rows.get(name, ()))) != 1 for rows in self._rows):
            return "its calls differ in size"
        return ""

    def _answers(
        self, record: dict[str, Any], blocks: Sequence[str], folds: int
    ) -> dict[nn.Module, Forward]:
        return {
            self._modules[path]: answer(record[path], self._repeats.get(path), folds)
            for path in blocks
        }

    def _device_bytes(self) -> int:
        """Of what blocks returned, held where they returned it."""
        leaves = tree_flatten(self._record)[0]
        return sum(x.nbytes for x in leaves if isinstance(x, Recorded) and not x.offloaded)


def _recorder(path: str, original: Forward, record: dict[str, Any], offload: bool) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        record[path] = tree_map_only(Tensor, lambda t: Recorded.of(t, offload), output)
        return output

    return forward


def _stop_after(original: Forward) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise _Reached

    return forward
