"""ZeRO-2 and ZeRO-3 of DeepSpeed in two CPU processes: losses and adapters beside plain PEFT's.

Run by `make deepspeed`, which installs the package in an environment of its own. ZeRO-2 keeps
parameters whole, so every layer stays fused. ZeRO-3 gathers them in hooks inside the layers: PEFT's
own forward then runs, counted with its reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 4
LIMIT = 600  # seconds
PROCESSES = 2
HOOKS = "hooks inside the layer"


def worker(stage: int, accelerated: bool, result: str) -> None:
    """One of two processes; the first writes losses, adapters and the report."""
    import deepspeed
    import torch
    import torch.distributed as dist

    import adarank_fast as ada
    from tests.training.small import inputs, mixed_llama

    # An operator for shared memory that would be compiled at every start.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    model = mixed_llama()
    if accelerated:
        ada.accelerate(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained.values(), lr=0.5),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    losses = []
    for step in range(STEPS):
        rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        loss = engine(**{key: value[rows] for key, value in inputs(step).items()}).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / PROCESSES)
    with deepspeed.zero.GatheredParameters(list(trained.values()), enabled=stage == 3):
        adapters = {name: p.double().norm().item() for name, p in trained.items()}
    report = ada.fusion_report(model).values() if accelerated else ()
    if dist.get_rank() == 0:
        found = {
            "losses": losses,
            "adapters": adapters,
            "reasons": sorted({reason for layer in report for reason in layer.reasons}),
            "fused": sum(layer.fused for layer in report),
        }
        Path(result).write_text(json.dumps(found))


def run(stage: int, accelerated: bool, folder: Path) -> dict:
    """Start the processes; what the first wrote."""
    result = folder / f"{stage}-{accelerated}.json"
    common = {
        **os.environ,
        **{"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "DS_ACCELERATOR": "cpu"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "WORLD_SIZE": str(PROCESSES)},
        **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    }
    logs = [folder / f"{stage}-{accelerated}-{rank}.log" for rank in range(PROCESSES)]
    command = [sys.executable, "-m", "tests.deepspeed.check", str(stage), str(int(accelerated))]
    workers = []
    try:
        for rank, log in enumerate(logs):
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as stream:
                workers.append(
                    subprocess.Popen(
                        [*command, str(result)], cwd=ROOT, env=env, stdout=stream, stderr=stream
                    )
                )
        codes = [process.wait(LIMIT) for process in workers]
    finally:
        for process in workers:
            process.kill()
    assert not any(codes), logs[0].read_text()[-3000:]
    return json.loads(result.read_text())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for stage in (2, 3):
            theirs, ours = (run(stage, accelerated, Path(folder)) for accelerated in (False, True))
            pairs = [*zip(ours["losses"], theirs["losses"], strict=True)]
            pairs += [(ours["adapters"][name], norm) for name, norm in theirs["adapters"].items()]
            gap = max(abs(one - other) / other for one, other in pairs)
            assert gap < 1e-5, (stage, gap)
            assert ours["reasons"] == ([] if stage == 2 else [HOOKS]), ours["reasons"]
            fused = f"{ours['fused']} layers fused"
            how = fused if stage == 2 else f"PEFT's forward: {HOOKS}"
            print(f"ZeRO-{stage}: {STEPS} steps, at most {gap:.1e} from plain PEFT; {how}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        worker(int(sys.argv[1]), sys.argv[2] == "1", sys.argv[3])
    else:
        main()
