"""Batches of few lengths, and a Trainer whose blocks are captured for them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

import adarank_fast as ada
from adarank_fast.adapters.graph_blocks import graph_report, graph_with
from tests.adapters.fused_models import mixed
from tests.adapters.graph_stand_in import StandIn
from tests.tiny_models import VOCABULARY

PAD = 3


def padded(rows):
    """A collator that pads to the longest."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])
    real = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": real.long(),
        "labels": ids.masked_fill(~real, -100),
        "rows": torch.tensor([len(row) for row in rows]),
    }


def rows(count):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def test_batches_are_padded_to_the_next_length():
    collate = ada.BucketCollator(padded, [8, 5], PAD)
    batch = collate([[7, 8, 9], [4, 4]])
    assert batch["input_ids"].tolist() == [[7, 8, 9, PAD, PAD], [4, 4, PAD, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9, -100, -100], [4, 4, -100, -100, -100]]
    assert batch["rows"].tolist() == [3, 2]
    for length, wanted in ((5, 5), (6, 8), (8, 8), (9, 9)):
        assert collate([[4] * length])["input_ids"].shape[1] == wanted
    with pytest.raises(ada.AdarankError, match="returns no attention_mask"):
        ada.BucketCollator(lambda r: {"input_ids": torch.ones(1, 2)}, [4], PAD)([])
    for lengths in ([], [0], [2.5]):
        with pytest.raises(ada.AdarankError, match="positive integers"):
            ada.BucketCollator(padded, lengths, PAD)


def test_a_trainer_with_graphs_ends_where_one_without_does(tmp_path):
    plain = mixed("llama", lora_dropout=0.2)
    models = [plain, graph_with(copy.deepcopy(plain), StandIn(), frozenset({(2, 8)}))]
    losses = []
    for model in models:
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6,
            learning_rate=1e-2, logging_steps=1, eval_strategy="steps", eval_steps=3, seed=5,
            report_to="none", disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
            use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows(11), eval_dataset=rows(4),
            data_collator=ada.BucketCollator(padded, [8], PAD),
        )  # fmt: skip
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 6
    report = graph_report(models[1])
    assert report.shapes == {(2, 8): 2} and report.graphed_calls > 8, str(report)
