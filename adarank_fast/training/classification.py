"""Classification on `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy
import torch
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from adarank_fast.errors import AdarankError
from adarank_fast.models.identity import digest_data
from adarank_fast.models.text import first_line
from adarank_fast.training.data import Data
from adarank_fast.training.evaluation import evaluate, macro_f1, metrics
from adarank_fast.training.tokens import Item, collate, encode_labelled, pad_id, some
from adarank_fast.training.trainer import ItemTrainer, Watch

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments

    from adarank_fast.training.arguments import Fields


class Classification:
    """Labelled texts, tokenised: to train on, to measure on, to predict ranks on.

    Args:
        data: with labels.
        held_out: to measure on; None: some of `data`.
        tokenizer: of the model.
        settings: max_length is looked at.
    """

    def __init__(
        self,
        data: Data,
        held_out: Data | None,
        tokenizer: PreTrainedTokenizerBase,
        settings: Fields,
    ) -> None:
        length = int(settings.get("max_length", 128))
        classes = list(data.classes)
        if len(classes) < 2:
            raise AdarankError(
                f"classification needs two classes, the data have only {''.join(classes)!r}"
            )

        def encoded(part: Data) -> list[Item]:
            labels = list(part.labels or ())
            if unknown := sorted(set(labels) - set(classes)):
                raise AdarankError(
                    f"the evaluation data have a label {unknown[0]!r} that the training data do "
                    "not have; correct it or drop those rows"
                )
            return encode_labelled(tokenizer, list(part.texts), labels, classes, length)

        self.pad = pad_id(tokenizer)
        self.items = encoded(data)
        self.held_out = some(self.items) if held_out is None else encoded(held_out)

    def digest(self) -> str:
        """Of what is trained on."""
        return digest_data(self.items)

    def calibration(
        self, count: int, device: torch.device, batch_size: int = 16
    ) -> list[dict[str, Tensor]]:
        """Batches of so many of the examples, without their labels."""
        chosen = [
            {key: value for key, value in item.items() if key != "labels"}
            for item in some(self.items, count)
        ]
        starts = range(0, len(chosen), batch_size)
        batches = [collate(chosen[start : start + batch_size], self.pad) for start in starts]
        return [{key: value.to(device) for key, value in batch.items()} for batch in batches]

    def trainer(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> ItemTrainer:
        """A trainer whose evaluations have accuracy and macro F1.

        Args:
            model: with adapters.
            arguments: a `ClassificationConfig`.
            callbacks: beside `Watch`.

        Raises:
            AdarankError: the trainer refuses the arguments.
        """
        try:
            trainer = ItemTrainer(
                model=model,
                args=arguments,
                train_dataset=self.items,
                eval_dataset=self.held_out,
                data_collator=lambda chosen: collate(chosen, self.pad),
                compute_metrics=_accuracy,
                callbacks=[Watch(), *callbacks],
            )
        except (ValueError, ImportError, RuntimeError) as error:  # report_to without its library
            raise AdarankError(f"Trainer refuses: {first_line(error)}") from error
        # encoders take the number of items in all accumulated batches, and do not divide by it
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        return trainer

    def measure(self, trainer: ItemTrainer) -> dict[str, float]:
        """Metrics of the trainer's model; see `evaluation.metrics`."""
        size = trainer.args.per_device_eval_batch_size
        return metrics(evaluate(cast(nn.Module, trainer.model), self.held_out, self.pad, size))


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits  # and hidden states, say
    guesses = logits.argmax(-1)
    labels = cast(numpy.ndarray, prediction.label_ids)
    return {"accuracy": float((guesses == labels).mean()), "f1": macro_f1(guesses, labels)}
