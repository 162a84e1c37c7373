"""The training loop, on `transformers.Trainer`: its records, and the batches of items."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback

from adarank_fast.adapters.fusion_report import products
from adarank_fast.options import check_number
from adarank_fast.training.tokens import Item, collate, item_length

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

CURVE_POINTS = 40  # of a training curve, at most about
DIVERGED = 2.0  # a run that ends above this many times its first loss has diverged
SORTED_BATCHES = 50  # batches among which items are sorted by length


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
    """Losses, times and tokens of a training run, also from before an interruption.

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


class Watch(TrainerCallback, ExportableState):
    """Records a run. What it has seen is saved in checkpoints, and a resumed run goes on from it.

    Trainer makes it anew from `state` when it resumes, so it has no arguments. `Watched` feeds it.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.tokens = 0
        self.over = False  # before this process began to train
        self.setting: dict[str, object] = {}  # what a result depends on in its last bits
        self._of_step: list[Tensor] = []  # losses of the batches that are accumulated to a step
        self._new: list[tuple[Tensor, Tensor]] = []  # (loss, tokens) still on their device
        self._tokens: list[Tensor] = []

    def state(self) -> dict[str, object]:
        """What Trainer saves in a checkpoint and gives back when it resumes."""
        self._read()
        names = ("losses", "seconds", "tokens", "setting")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def batch(self, loss: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """Record a batch; nothing is copied from its device yet."""
        mask = inputs.get("attention_mask", inputs.get("input_ids"))
        self._of_step.append(loss.detach())
        if isinstance(mask, Tensor):
            unmasked = "attention_mask" in inputs
            self._tokens.append(mask.sum() if unmasked else torch.tensor(mask.numel()))

    def training(self) -> Training:
        """Losses, seconds and tokens of every step so far."""
        self._read()
        return Training(self.losses, self.seconds, self.tokens)

    def _read(self) -> None:
        self.losses += [float(loss) for loss, _ in self._new]
        self.tokens += sum(int(tokens) for _, tokens in self._new)
        self._new = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Note what the last bits of a result depend on; warn if a resumed run differs in it.

        A run that was cut off after its last step is over. Trainer would take one step more, or,
        after an early stop, train on to the next evaluation.
        """
        assert model is not None  # Trainer's own
        saved = cast("dict[str, dict[str, Any]]", state.stateful_callbacks or {})  # as from a file
        stopped = saved.get("TrainerControl", {}).get("args", {})
        self.over = state.global_step > 0 and (
            state.global_step >= state.max_steps or stopped.get("should_training_stop", False)
        )
        control.should_training_stop = self.over
        now = {
            "products": products(model),
            "device": str(args.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        for name, before in self.setting.items():
            if before != now[name]:
                warnings.warn(
                    f"this run began with {name} = {before} and goes on with {now[name]}: it will "
                    "not equal an undisturbed run to the last bit",
                    stacklevel=2,
                )
        self.setting = now

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Start the step's clock."""
        self._started = time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Stop the step's clock, when the device is done, and sum the batches' losses."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._started)
        tokens = sum(self._tokens, torch.tensor(0))
        self._new.append((torch.stack(self._of_step).sum(), tokens))
        self._of_step, self._tokens = [], []

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Leave what was evaluated and saved as it is, if nothing was trained."""
        if self.over:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Stop the training if a loss is not finite."""
        self._read()
        if not all(map(math.isfinite, self.losses)):
            control.should_training_stop = True


class Watched:
    """Mixed into a trainer: passes every batch to the `Watch` among its callbacks."""

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Tensor], *rest: object, **named: object
    ) -> Tensor:
        """Trainer's own step; `Watch` gets the loss and the batch."""
        loss: Tensor = super().training_step(model, inputs, *rest, **named)  # type: ignore[misc]
        watch_of(cast(Trainer, self)).batch(loss, inputs)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own batches of a step; none if the run was over when it was resumed."""
        if watch_of(cast(Trainer, self)).over:
            return [], None
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]


def watch_of(trainer: Trainer) -> Watch:
    """The `Watch` among a trainer's callbacks."""
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, Watch))


class OnStep(TrainerCallback):
    """Calls a function after every step."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Call the function."""
        self._function()


class LengthGroups(Sampler[int]):
    """Items of like length in one batch, batches in random order.

    The order depends on seed and epoch alone, not on other draws from torch's generator. So arms
    of any ranks, and continued runs, see the items in the same order.
    """

    def __init__(self, items: Sequence[Item], batch_size: int, seed: int) -> None:
        self.lengths = [item_length(item) for item in items]
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next."""
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


class ItemTrainer(Watched, Trainer):
    """Trains on items, like lengths together; the order depends on the arguments' seed alone."""

    def _get_train_sampler(self, train_dataset: Dataset[Item] | None = None) -> Sampler[int] | None:
        if getattr(self.args, "train_sampling_strategy", "random") != "random":
            return super()._get_train_sampler(train_dataset)
        items = self.train_dataset if train_dataset is None else train_dataset
        return LengthGroups(cast(Sequence[Item], items), self.args.train_batch_size, self.args.seed)


def fit(
    model: nn.Module,
    items: Sequence[Item],
    pad: int,
    recipe: Recipe,
    on_step: Callable[[], object] = lambda: None,
) -> Training:
    """Train the parameters that require gradients, in place. Stops if a loss is not finite.

    Args:
        model: takes a batch of items as keywords, returns "loss" and "logits".
        items: with labels.
        pad: token id to pad with.
        recipe: epochs, batch size, learning rate and seed.
        on_step: called after every step.
    """
    steps = recipe.steps(len(items))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
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
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = ItemTrainer(
            model=model,
            args=arguments,
            train_dataset=list(items),
            data_collator=lambda chosen: collate(chosen, pad),
            callbacks=[Watch(), OnStep(on_step)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return watch_of(trainer).training()


def adapter_parameters(peft_model: nn.Module) -> int:
    """Parameters of all lora_A and lora_B, counted in the model itself."""
    return sum(p.numel() for name, p in peft_model.named_parameters() if ".lora_" in name)
