"""The same work in fresh processes: the same bits, and across threads and orders the same plan.

python -m tests.reliability.sameness '{"threads": 2, ...}'       (one process; prints JSON)
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
KINDS = ("bert", "llama", "gpt2", "t5", "deberta")
CLOSE = 1e-6  # of a score
TIE = 1e-4  # of a rank: remainders that are as close may go either way
WAIT = 300.0  # seconds of a process


@dataclass(frozen=True)
class Setting:
    """How one process works.

    Attributes:
        seed: of the noise and of the training.
        threads: of torch.
        order: seed of the order of the batches; 0: as they are.
        processes: that predict together.
        kinds: of models.
    """

    seed: int = 0
    threads: int = 1
    order: int = 0
    processes: int = 1
    kinds: tuple[str, ...] = KINDS


def work(setting: Setting) -> dict[str, Any]:
    """Predict, train and answer: scores and ranks of each model, digests of all else."""
    import torch

    import adarank_fast as ada
    from tests.adapters.fused_models import TARGETS, loss_of, mixed
    from tests.tiny_models import batch, tiny

    torch.set_num_threads(setting.threads)
    if setting.processes > 1:
        torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {"scores": {}, "ranks": {}, "bits": {}}
    for kind in setting.kinds:
        lengths = ((9, 7, 9, 4), (5, 3), (12, 1, 2))
        batches = [batch(kind, one, seed=i, width=12) for i, one in enumerate(lengths)]
        if setting.order:
            Random(setting.order).shuffle(batches)
        options = dict(target_modules="all-linear", trials=2, seed=setting.seed, progress=False)
        plan = ada.predict_ranks(tiny(kind, layers=2), batches, 6, **options)
        found["scores"][kind] = {name: score.mean for name, score in plan.scores.items()}
        found["ranks"][kind] = dict(plan.ranks)
        trials = {name: [x.hex() for x in score.trials] for name, score in plan.scores.items()}
        found["bits"][f"{kind}: scores"] = digest(json.dumps(trials).encode())
        if kind not in TARGETS or setting.processes > 1:
            continue
        model = ada.accelerate(mixed(kind, lora_dropout=0.1))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        torch.manual_seed(setting.seed)
        for step in range(3):
            loss_of(model, kind, seed=setting.seed + step).backward()
            optimizer.step()
            optimizer.zero_grad()
        tensors = (p.detach().numpy().tobytes() for p in trained)
        found["bits"][f"{kind}: trained"] = digest(b"".join(tensors))
    return found


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def in_a_process(setting: Setting) -> dict[str, Any]:
    """`work` in a fresh interpreter, or in as many as the setting says; of the first."""
    command = [sys.executable]
    if setting.processes > 1:
        several = f"--standalone --nproc-per-node {setting.processes}"
        command += ["-m", "torch.distributed.run", *several.split()]
    command += ["-m", "tests.reliability.sameness", json.dumps(asdict(setting))]
    roots = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": roots},
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines, f"{setting}: {done.stderr[-1500:]}"
    return dict(json.loads(lines[0]))


def same_bits(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    return [f"{name}: other bits" for name in one["bits"] if one["bits"][name] != two["bits"][name]]


def same_plan(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Scores that differ by more than rounding, and ranks that differ and are no tie."""
    odd = []
    for kind, scores in one["scores"].items():
        other = two["scores"][kind]
        off = max(abs(scores[name] - other[name]) / max(1, scores[name]) for name in scores)
        if scores.keys() != other.keys() or not off <= CLOSE:
            odd.append(f"{kind}: scores differ by {off:.2g}")
        ranks, others = one["ranks"][kind], two["ranks"][kind]
        moved = [name for name in ranks if ranks[name] != others[name]]
        total = sum(ranks.values()) / sum(scores.values())
        remainders = [scores[name] * total % 1 for name in moved]
        if moved and max(remainders) - min(remainders) > TIE:
            odd.append(f"{kind}: other ranks of {moved}")
    return odd


def settings(random: Random) -> Iterator[Setting]:
    """One seed after the other; a setting that comes twice must give the same bits."""
    while True:
        first = Setting(seed=random.randrange(1000))
        yield from (first, first)
        yield replace(first, order=random.randrange(1, 1000))
        yield replace(first, processes=2)
        yield from [replace(first, threads=2)] * 2
        yield replace(first, threads=2, order=random.randrange(1, 1000))


def soak(seconds: float, seed: int = 0, most: float = float("inf")) -> dict[str, Any]:
    """Fresh processes with one setting after the other, held against the first of their seed."""
    deadline = time.monotonic() + seconds
    counts: dict[str, Any] = {"processes": 0, "same bits": 0, "same plan": 0}
    faults: list[str] = []
    seen: dict[Setting, dict[str, Any]] = {}
    for setting in settings(Random(seed)):
        if counts["processes"] >= most or time.monotonic() >= deadline:
            break
        found = in_a_process(setting)
        counts["processes"] += setting.processes
        if setting in seen:
            odd, name = same_bits(seen[setting], found), "same bits"
        elif first := next((f for s, f in seen.items() if s.seed == setting.seed), None):
            odd, name = same_plan(first, found), "same plan"
        else:
            odd, name = [], None
        seen[setting] = found
        faults += [f"{setting}: {one}" for one in odd]
        if name and not odd:
            counts[name] += 1
    return counts | {"faults": faults}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    made = work(Setting(**asked | {"kinds": tuple(asked["kinds"])}))
    sys.stdout.write(json.dumps(made) + "\n")
    sys.stdout.flush()
    os._exit(0)
