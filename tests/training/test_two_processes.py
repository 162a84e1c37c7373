"""DDP (through accelerate) and FSDP2 on two CPU processes: the numbers of one process, fused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 100  # seconds; about 20 are needed, most of them to import transformers and peft

CASES = [
    "ddp",
    "ddp, checkpointing",
    "fsdp",
    "fsdp, checkpointing",
    "fsdp, accelerated after",
    "fsdp, LoRA layers as units",
    "fsdp, lora_A and lora_B as units",
]


def test_ddp_and_fsdp_give_the_numbers_of_one_process(tmp_path):
    common = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",  # accelerate wants both; the processes meet at a file
        "MASTER_PORT": "29500",
    }
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    workers = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as stream:
                worker = subprocess.Popen(
                    [sys.executable, "-m", "tests.training.worker", str(tmp_path)],
                    cwd=ROOT,
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
            workers.append(worker)
        codes = [worker.wait(LIMIT) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for code, log in zip(codes, logs, strict=True):
        text = log.read_text()
        assert code == 0, text[-3000:]
        passed = [line.removeprefix("passed: ") for line in text.splitlines() if "passed: " in line]
        assert passed == CASES
