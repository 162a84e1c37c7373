"""Labelled texts: mixed ranks, transformers' Trainer, and the saved adapter in use."""

from __future__ import annotations

import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import adarank_fast as ada
from toy import save_encoder, texts

CLASSES = ["negative", "positive"]


def main(steps: int = 100) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "encoder")
        save_encoder(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        train, held_out = texts(400), texts(100, seed=1)

        # Ranks come from the encoder without a head: a new head is random.
        inputs = tokenizer([text for text, _ in train[:32]], padding=True, return_tensors="pt")
        batch = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        plan = ada.predict_ranks(
            AutoModel.from_pretrained(folder), [batch], average_rank=4, progress=False
        )
        print(plan.table())

        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=2, id2label=dict(enumerate(CLASSES))
        )
        peft_model = ada.inject(model, plan, task_type="SEQ_CLS", example=batch)

        encoded = tokenizer([text for text, _ in train])
        rows = {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": [CLASSES.index(label) for _, label in train],
        }
        arguments = TrainingArguments(
            output_dir=str(Path(name, "out")),
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=5e-3,
            report_to="none",
            save_strategy="no",
        )
        trainer = Trainer(
            model=peft_model,
            args=arguments,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        print(ada.fusion_report(peft_model))

        peft_model.eval()
        lines = [f"{text},{label}" for text, label in held_out]
        Path(name, "held_out.csv").write_text("\n".join(["text,label", *lines]))
        print(ada.evaluate(peft_model, Path(name, "held_out.csv"), tokenizer=tokenizer))
        peft_model.save_pretrained(Path(name, "adapter"))


if __name__ == "__main__":
    main()
