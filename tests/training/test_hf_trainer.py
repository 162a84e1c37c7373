"""`transformers.Trainer`: plain PEFT's losses, checkpoints of adapters alone, exact resuming."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

import adarank_fast as ada
from tests.training.small import GROUPS, adapters, assert_near, inputs, items, mixed_llama


def collate(rows):
    return default_collate([{k: torch.tensor(v) for k, v in row.items()} for row in rows])


def train(model, folder, resume=None, **arguments):
    """Six steps, a checkpoint after three; the loss of each step."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=6,
            save_steps=3,
            logging_steps=1,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            seed=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=items(24),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_losses_are_plain_pefts(tmp_path, checkpointing):
    plain, fused = mixed_llama(), ada.accelerate(mixed_llama())
    losses = [
        train(m, tmp_path / str(n), gradient_checkpointing=checkpointing)
        for n, m in enumerate((plain, fused))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 6
    assert_near(adapters(fused), adapters(plain), 1e-3)  # Adam divides by small second moments
    report = ada.fusion_report(fused)
    assert report.fused_share == 1.0
    assert {len(layer.group) for layer in report.values()} == GROUPS


def test_a_checkpoint_holds_adapters_only_and_resumes(tmp_path):
    """With dropout too: the masks come from torch's generator, which Trainer restores."""

    def fresh():
        return ada.accelerate(mixed_llama(lora_dropout=0.2), example=inputs(0))

    whole, resumed = fresh(), fresh()
    expected = train(whole, tmp_path)
    checkpoint = tmp_path / "checkpoint-3"
    assert not list(checkpoint.glob("model*")) and not list(checkpoint.glob("pytorch_model*"))
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert len(saved) == len(adapters(whole)) and all(".lora_" in name for name in saved)
    losses = train(resumed, tmp_path / "resumed", resume=str(checkpoint))
    assert losses == expected and len(set(losses)) == 6
    assert all(p.equal(adapters(whole)[name]) for name, p in adapters(resumed).items())
