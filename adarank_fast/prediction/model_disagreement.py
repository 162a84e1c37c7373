"""How far K models, or K adapters on one base, are from each other on unlabelled batches.

Low disagreement between runs that differ in their seed goes with better generalisation (AdaRank,
arXiv 2408.09015, section 3, after Jiang et al., arXiv 2106.13799).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from adarank_fast.errors import AdarankError
from adarank_fast.models.batches import Batch, prepare_batches
from adarank_fast.models.forward_patching import flags_restored, undisturbed
from adarank_fast.models.outputs import (
    Output,
    OutputChoice,
    accepted,
    choose_output,
    position_mask,
    small_sample,
)
from adarank_fast.models.quantization import unpacked
from adarank_fast.models.targets import find_block, unwrap
from adarank_fast.options import check_choice
from adarank_fast.prediction.disagreement import as_head, flat_mask, positions
from adarank_fast.prediction.recording import record_clean_passes
from adarank_fast.prediction.replay import Replay
from adarank_fast.undo import undone
from adarank_kernels import pairwise_disagreement
from adarank_kernels.disagreement.choices import METRICS

if TYPE_CHECKING:
    from peft import PeftModel

Run = tuple[Tensor, "Tensor | None", "nn.Module | None"]  # [K, B, ...], mask [B, T], head


def model_disagreement(
    models: Sequence[nn.Module] | nn.Module,
    batches: Iterable[Batch],
    output: OutputChoice = "auto",
    metric: str = "l1",
    adapters: Sequence[str] | None = None,
) -> Tensor:
    """[K, K] disagreement between models on the same inputs.

    Args:
        models: K >= 2 modules with outputs of one shape; or one PeftModel, with `adapters`: then
            the blocks before the first adapted one run once for all.
        batches: dicts of the models' keyword inputs, labels ignored, on their device.
        output: what to compare: see `predict_ranks`.
        metric: "l1", "tv", "kl" (row against column), "js" or "argmax"; see
            `adarank_kernels.pairwise_disagreement`.
        adapters: names of K adapters of the PeftModel.

    Returns:
        [K, K] float64 on the CPU: the metric's mean over unmasked positions of all batches.

    Raises:
        AdarankError: one line that names the argument, its value and the remedy.
    """
    check_choice("metric", metric, METRICS)
    if adapters is not None:
        runs = _adapter_outputs(models, batches, output, list(adapters))
    else:
        runs = _model_outputs(models, batches, output)
    with closing(runs):  # at once, also while an exception still refers to it
        total, count = _sums(runs, metric)
    if total is None:
        raise AdarankError("batches: every position is masked; nothing to compare")
    return total / count


def _sums(runs: Iterator[Run], metric: str) -> tuple[Tensor | None, int]:
    """The metric summed over unmasked positions of all batches, and how many there are."""
    total: Tensor | None = None
    count = 0
    for outputs, mask, head in runs:
        flat = flat_mask(mask, outputs[0])
        counted = positions(outputs[0], mask)
        if counted:
            rows = outputs.flatten(1, -2)
            sums = pairwise_disagreement(
                rows.double() if head is None else rows,
                **as_head(head),
                metric=metric,
                mask=flat,
                reduction="sum",
            )
            total = sums.double().cpu() if total is None else total + sums.double().cpu()
            count += counted
    return total, count


def _model_outputs(
    models: Sequence[nn.Module] | nn.Module, batches: Iterable[Batch], output: OutputChoice
) -> Generator[Run]:
    if isinstance(models, nn.Module) or len(models) < 2:
        raise AdarankError(
            "models must be a list of at least two; for adapters of one PeftModel name them in "
            "adapters="
        )
    inners = [unwrap(model) for model in models]
    prepared = prepare_batches(inners[0], batches)
    with ExitStack() as stack:
        stack.enter_context(undisturbed(*inners))
        for inner in dict.fromkeys(inners):
            stack.enter_context(unpacked(inner))
        chosen = [_choose(inner, output, small_sample(inner, prepared[0])) for inner in inners]
        passes = [
            record_clean_passes(inner, how, prepared, (), skip_head=False)
            for inner, how in zip(inners, chosen, strict=True)
        ]
        for index, batch in enumerate(prepared):
            outputs = [clean.outputs[index] for clean in passes]
            for number, value in enumerate(outputs):
                if value.shape != outputs[0].shape:
                    raise AdarankError(
                        f"models[{number}] gives an output of shape {list(value.shape)}, models[0] "
                        f"of shape {list(outputs[0].shape)}; compare models of one task"
                    )
            yield torch.stack(outputs), position_mask(inners[0], batch), None


def _adapter_outputs(
    model: Sequence[nn.Module] | nn.Module,
    batches: Iterable[Batch],
    output: OutputChoice,
    adapters: list[str],
) -> Generator[Run]:
    config: Mapping[str, object] = getattr(model, "peft_config", {})
    unknown = [name for name in adapters if name not in config]
    if unknown or len(adapters) < 2:
        has = ", ".join(config) or "it is no PeftModel"
        raise AdarankError(
            f"adapters={adapters!r} must name at least two adapters of the model ({has})"
        )
    peft_model = cast("PeftModel", model)
    inner = unwrap(peft_model)
    prepared = prepare_batches(inner, batches)
    with undisturbed(inner), unpacked(inner), _switching(peft_model):
        peft_model.set_adapter(adapters[0])
        chosen = _choose(inner, output, small_sample(inner, prepared[0]))
        clean = record_clean_passes(inner, chosen, prepared, ())
        replay = Replay(clean)
        adapted = [
            clean.position(find_block(inner, path))
            for path, _ in inner.named_modules()
            if ".lora_A" in path or ".modules_to_save" in path
        ]
        replay.advance(min(adapted, default=0))
        for index, batch in enumerate(prepared):
            outputs = []
            for name in adapters:
                peft_model.set_adapter(name)
                outputs.append(replay.run(index, 1, {})[0])
            yield torch.stack(outputs), position_mask(inner, batch), clean.reader.head


def _choose(model: nn.Module, output: OutputChoice, sample: Batch) -> Output:
    """The output to compare: logits if there are any, since these models were trained."""
    if output in ("auto", "logits"):
        outputs = model(**accepted(model, sample))
        if isinstance(getattr(outputs, "logits", None), Tensor):
            return Output("logits", "", lambda outputs, inputs: outputs.logits)
    return choose_output(model, output, sample)


@contextmanager
def _switching(peft_model: PeftModel) -> Iterator[None]:
    """The active adapter and what requires gradients, as before at the end."""
    names = ("active_adapter", "_active_adapter")
    active = [
        (module, {name: vars(module)[name] for name in names if name in vars(module)})
        for module in peft_model.modules()
    ]

    def undo() -> None:
        for module, attributes in active:
            vars(module).update(attributes)

    with flags_restored(peft_model), undone(undo):
        yield
