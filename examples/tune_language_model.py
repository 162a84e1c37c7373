"""Prompts and completions with TRL's SFTTrainer, with mixed ranks. Needs the extra `trl`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import adarank_fast as ada
from toy import BAD, GOOD, OTHER, save_encoder


def main(steps: int = 60) -> None:
    with tempfile.TemporaryDirectory() as name:
        save_encoder(Path(name))  # for its tokenizer
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.eos_token = "[PAD]"
        torch.manual_seed(0)
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        config = LlamaConfig(
            vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, **sizes
        )
        model = LlamaForCausalLM(config)

        # A good word in the prompt is answered by "fine", a bad one by "poor".
        pairs = [*((word, "fine") for word in GOOD), *((word, "poor") for word in BAD)]
        rows = [
            {"prompt": f"{other} {word}", "completion": f" {answer}"}
            for other in OTHER[:12]
            for word, answer in pairs
        ]
        inputs = tokenizer([row["prompt"] for row in rows[:16]], return_tensors="pt")
        batch = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        plan = ada.predict_ranks(
            model,
            [batch],
            average_rank=4,
            target_modules="all-linear",
            output="logits",
            progress=False,
        )
        peft_model = ada.inject(model, plan, example=batch, task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=peft_model,  # and no peft_config
            args=SFTConfig(
                str(Path(name, "out")),
                max_steps=steps,
                learning_rate=1e-2,
                logging_steps=max(steps // 4, 1),
                report_to="none",
                save_strategy="no",
                bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        print(ada.fusion_report(peft_model))


if __name__ == "__main__":
    main()
