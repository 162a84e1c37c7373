"""The training loop, on `transformers.Trainer`; evaluation; adapters in their folder."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler

from adarank_fast.errors import AdarankRuntimeError
from adarank_fast.files import Name, check_folder, new_folder, note_settings
from adarank_fast.options import check_number
from adarank_fast.training.tokens import Item, collate, item_length

CURVE_POINTS = 40  # of a training curve, at most about
DIVERGED = 2.0  # a run that ends above this many times its first loss has diverged
SORTED_BATCHES = 50  # batches among which items are sorted by length
CHECKPOINTS = 10  # of a run, about


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the items.
        batch_size: items a step.
        learning_rate: at its highest; linear warm-up over 6% of the steps, then linear decay.
        seed: of the head, the adapters, the order of the items and dropout.
        max_steps: stop after this many; None: after `epochs`.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            if (value := getattr(self, one.name)) is not None:
                object.__setattr__(self, one.name, check_number(one.name, value))

    def steps(self, items: int) -> int:
        """Steps that training on so many items takes."""
        steps = -(-items // self.batch_size) * self.epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass
class Training:
    """What one training run went through.

    Attributes:
        losses: of each step, in nats; non-finite ones included.
        seconds: of each step.
        tokens: unmasked tokens of all steps.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def diverged(self) -> str | None:
        """What is wrong with the losses, or None."""
        if not self.losses:
            return None
        for step, loss in enumerate(self.losses, 1):
            if not math.isfinite(loss):
                return f"training loss {loss} at step {step}"
        last = statistics.fmean(self.losses[-max(len(self.losses) // 10, 1) :])
        if last > DIVERGED * self.losses[0]:
            return f"training loss rose from {self.losses[0]:.3g} to {last:.3g}"
        return None

    def curve(self) -> list[tuple[int, float]]:
        """(step, mean loss since the point before), about `CURVE_POINTS` of them."""
        width = max(len(self.losses) // CURVE_POINTS, 1)
        points = []
        for start in range(0, len(self.losses), width):
            part = self.losses[start : start + width]
            points.append((start + len(part), statistics.fmean(part)))
        return points


class LengthGroups(Sampler[int]):
    """Items of like length in one batch, batches in random order.

    The order depends on seed and epoch alone, not on what else has drawn from torch's generator, so
    that arms of any ranks, and resumed runs, see the items alike.
    """

    def __init__(self, items: Sequence[Item], batch_size: int, seed: int) -> None:
        self.lengths = [item_length(item) for item in items]
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        size, width = self.batch_size, self.batch_size * SORTED_BATCHES
        full = len(order) // size * size
        grouped: list[int] = []
        for start in range(0, full, width):
            part = order[start : min(start + width, full)]
            grouped += sorted(part, key=lambda index: self.lengths[index])
        batches = [grouped[start : start + size] for start in range(0, full, size)]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[number]
        yield from order[full:]  # the short batch comes last


def fit(
    model: nn.Module,
    items: Sequence[Item],
    pad: int,
    recipe: Recipe,
    checkpoints: Path | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Training:
    """Train what of `model` requires gradients, in place. Stops early where the loss is not finite.

    Args:
        model: takes a batch of items as keywords, returns "loss" and "logits".
        items: with labels.
        pad: token id to pad with.
        checkpoints: a folder: the run is saved there now and then, and goes on from what is there.
        on_step: called after every step.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    training = Training()
    losses: list[torch.Tensor] = []
    on_gpu = torch.cuda.is_available()

    class Recorder(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            training.seconds.append(time.perf_counter() - self.started)
            on_step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            if not math.isfinite(logs.get("loss", 0.0)):
                control.should_training_stop = True

    class Loop(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            size = self.args.train_batch_size
            sampler = LengthGroups(items, size, recipe.seed)
            loader = DataLoader(
                self.train_dataset, size, sampler=sampler, collate_fn=self.data_collator
            )
            prepared: DataLoader[Any] = self.accelerator.prepare(loader)
            return prepared

        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            if "attention_mask" in inputs:
                training.tokens += int(inputs["attention_mask"].sum())
            loss = super().training_step(model, inputs, *rest, **named)
            losses.append(loss.detach())
            return loss

    steps = recipe.steps(len(items))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=str(checkpoints or scratch),
            num_train_epochs=recipe.epochs,
            max_steps=-1 if recipe.max_steps is None else steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.06,
            weight_decay=0.0,
            seed=recipe.seed,
            logging_steps=max(steps // CURVE_POINTS, 1),
            logging_nan_inf_filter=False,
            save_strategy="no" if checkpoints is None else "steps",
            save_steps=max(steps // CHECKPOINTS, 1),
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            use_cpu=not on_gpu,
        )
        trainer = Loop(
            model=model,
            args=arguments,
            train_dataset=list(items),
            data_collator=lambda chosen: collate(chosen, pad),
            callbacks=[Recorder()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoints and _last_checkpoint(checkpoints))
    model.eval()
    training.losses = [float(loss) for loss in losses]
    return training


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; trainer_state.json is what Trainer writes last."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(path.name.partition("-")[2]), path))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)  # cut off while it was written
    return str(max(found)[1]) if found else None


def adapter_parameters(peft_model: nn.Module) -> int:
    """Parameters of all lora_A and lora_B, counted in the model itself."""
    return sum(p.numel() for name, p in peft_model.named_parameters() if ".lora_" in name)


def train_adapter(
    peft_model: Any,
    items: Sequence[Item],
    pad: int,
    recipe: Recipe,
    folder: Name,
    description: Mapping[str, Any] | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Training:
    """Train a PeftModel and save its adapter; a run that was cut off goes on where it stopped.

    Checkpoints lie in a hidden folder beside `folder` until the adapter is saved, which appears as
    a whole or not at all; one that is there already is replaced.

    Args:
        folder: for the adapter.
        description: what else must be as it was for a run to go on: model, data, plan.

    Raises:
        AdarankError: the unfinished run beside `folder` is another one.
        AdarankRuntimeError: training diverged; nothing is saved.
    """
    folder = Path(folder)
    check_adapter_folder(folder)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    unfinished.mkdir(exist_ok=True)
    settings = {**asdict(recipe), **(description or {})}
    note_settings(unfinished, settings, "an unfinished run", "finish that one or delete it")
    training = fit(peft_model, items, pad, recipe, unfinished, on_step)
    if training.diverged:
        shutil.rmtree(unfinished)
        raise AdarankRuntimeError(
            f"{training.diverged}: training diverged; lower the learning rate"
        )
    with new_folder(folder, replace="adapter") as temporary:
        peft_model.save_pretrained(temporary)
    shutil.rmtree(unfinished)
    return training


def check_adapter_folder(folder: Path) -> None:
    """An AdarankError of one line unless `folder` may become, or be replaced by, an adapter's."""
    check_folder(folder, replace="adapter")
