"""TRL's `SFTTrainer` on an accelerated model of mixed ranks: the losses of plain PEFT."""

from __future__ import annotations

import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import adarank_fast as ada
from tests.tiny_models import VOCABULARY
from tests.training.small import GROUPS, adapters, assert_near, mixed_llama


def tokeniser():
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    words_only = Tokenizer(WordLevel(words, unk_token="<unk>"))
    words_only.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def texts():
    """Of different lengths, so that there is padding."""
    return [
        {"prompt": "w3 w4", "completion": "".join(f" w{(5 + i * j) % 80 + 5}" for j in range(i))}
        for i in range(1, 17)
    ]


def train(model, folder):
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=4,
            logging_steps=1,
            save_steps=4,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            max_length=32,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            seed=1,
        ),
        train_dataset=Dataset.from_list(texts()),
        processing_class=tokeniser(),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_trainer(tmp_path):
    plain, fused = mixed_llama(), ada.accelerate(mixed_llama())
    before = adapters(fused)
    losses = [train(m, tmp_path / str(n)) for n, m in enumerate((plain, fused))]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 4
    assert_near(adapters(fused), adapters(plain), 1e-3)
    assert all(not p.equal(before[name]) for name, p in adapters(fused).items())
    report = ada.fusion_report(fused)
    assert report.fused_share == 1.0
    assert {len(layer.group) for layer in report.values()} == GROUPS
    assert (tmp_path / "1" / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert not list((tmp_path / "1" / "checkpoint-4").glob("model*"))
