"""Train adapters of a plan's ranks on an encoder with `transformers.Trainer`; evaluate them."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adarank_fast.adapters import inject
from adarank_fast.data import collate
from adarank_fast.outputs import mean_pool
from adarank_fast.plan import RankPlan

LEARNING_RATE = 2e-3
BATCH_SIZE = 32
CURVE_POINTS = 40  # of a training curve, at most about

Item = dict[str, Any]  # input_ids, attention_mask: lists; labels: a number


class MeanPoolClassifier(nn.Module):
    """An encoder, its last hidden state averaged over unmasked positions, and a linear head."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(mean_pool(hidden, attention_mask))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@dataclass
class Run:
    """One training run of one arm.

    Attributes:
        arm, seed: which.
        correct: for each held-out item, whether it was classified rightly.
        losses: (step, mean training loss since the point before).
        step_seconds: median time of a training step.
        parameters: adapter parameters in the model that was trained.
    """

    arm: str
    seed: int
    correct: list[bool] = field(repr=False)
    losses: list[tuple[float, float]] = field(repr=False)
    step_seconds: float
    parameters: int

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.correct)


def encode(
    tokenizer: Any, examples: Sequence[tuple[str, str]], labels: Sequence[str]
) -> list[Item]:
    """Token ids and the label's number of each (text, label)."""
    numbers = {label: number for number, label in enumerate(labels)}
    tokenised = tokenizer([text for text, _ in examples], truncation=True, max_length=64)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": numbers[label]}
        for ids, mask, (_, label) in zip(
            tokenised["input_ids"], tokenised["attention_mask"], examples, strict=True
        )
    ]


def train_arm(
    encoder: nn.Module,
    plan: RankPlan,
    items: Sequence[Item],
    classes: int,
    pad: int,
    *,
    seed: int = 0,
    epochs: int = 2,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = BATCH_SIZE,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[nn.Module, list[tuple[float, float]], list[float]]:
    """Train adapters of a plan's ranks, and a new head, on a copy of `encoder`.

    Args:
        encoder: left as it is.
        plan: made on it.
        items: as `encode` makes them.
        classes: outputs of the head.
        pad: token id to pad with.
        seed: of the head, the adapters, the order of the items and dropout.
        on_step: called after every step.

    Returns:
        The trained PeftModel, its training curve (see `Run.losses`), the seconds of each step.
    """
    from transformers import Trainer, TrainingArguments, set_seed
    from transformers.trainer_callback import PrinterCallback

    set_seed(seed)
    model = MeanPoolClassifier(copy.deepcopy(encoder), classes)  # the head comes first: same draws
    peft_model = inject(model, plan, modules_to_save=["head"])
    recorder = _recorder(on_step)
    steps = -(-len(items) // batch_size) * epochs
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.06,
            weight_decay=0.0,
            seed=seed,
            train_sampling_strategy="group_by_length",
            logging_steps=max(steps // CURVE_POINTS, 1),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            use_cpu=True,
        )
        trainer = Trainer(
            model=peft_model,
            args=arguments,
            train_dataset=list(items),
            data_collator=lambda chosen: collate(chosen, pad),
            callbacks=[recorder],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return peft_model.eval(), recorder.losses, recorder.seconds


def _recorder(on_step: Callable[[], None]) -> Any:
    """A Trainer callback that keeps the training curve and the time of each step."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[tuple[float, float]] = []
            self.seconds: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)
            on_step()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            if logs and "loss" in logs:
                self.losses.append((state.global_step, float(logs["loss"])))

    return Recorder()


def evaluate(model: nn.Module, items: Sequence[Item], pad: int, batch_size: int = 64) -> list[bool]:
    """For each item, whether its largest logit is that of its label."""
    model.eval()
    order = sorted(range(len(items)), key=lambda index: len(items[index]["input_ids"]))
    correct = [False] * len(items)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([items[index] for index in chosen], pad)
            labels = batch.pop("labels")
            right = model(**batch)["logits"].argmax(-1) == labels
            for index, value in zip(chosen, right.tolist(), strict=True):
                correct[index] = value
    return correct


def adapter_parameters(peft_model: nn.Module) -> int:
    """Parameters of all lora_A and lora_B, counted in the model itself."""
    return sum(p.numel() for name, p in peft_model.named_parameters() if ".lora_" in name)
