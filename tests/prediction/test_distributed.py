"""Several processes give the plan of one."""

from __future__ import annotations

import os
import subprocess
import sys

import adarank_fast as ada
from tests.prediction.tiny_predictions import assert_same, predict

WORKER = """
import os, sys, torch, torch.distributed as dist
import adarank_fast as ada
from tests.tiny_models import batch, tiny
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=__import__("datetime").timedelta(seconds=60))
rank = dist.get_rank()
plan = ada.predict_ranks(tiny("bert"), [batch("bert")], trials=ada.AdaptiveTrials(2, 6),
                         average_rank=16, checkpoint=sys.argv[1] + "/c", progress=False)
plan.save(f"{sys.argv[1]}/{rank}.json")
for label, model, inputs in (
    ("batches", tiny("bert"), batch("bert", seed=rank)),
    ("nan", tiny("bert"), batch("bert")),
):
    try:
        output = (lambda o: o.last_hidden_state / (rank == 0)) if label == "nan" else "auto"
        if label == "nan" and rank == 0:
            output = lambda o: o.last_hidden_state
        ada.predict_ranks(model, [inputs], trials=1, output=output, progress=False)
    except ValueError as error:
        os.write(1, f"{label} {rank} {error}\\n".encode())  # whole lines: the pipe is shared
dist.destroy_process_group()
"""


def test_two_processes_give_the_plan_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    paths = os.pathsep.join([os.getcwd(), os.path.join(os.getcwd(), "kernels")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--standalone", str(tmp_path / "worker.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plans = [ada.RankPlan.load(tmp_path / f"{rank}.json") for rank in (0, 1)]
    alone = predict(trials=ada.AdaptiveTrials(2, 6), average_rank=16)
    assert_same(alone, plans[0])
    assert plans[0].scores == plans[1].scores
    lines = {line.split()[0] + line.split()[1] for line in done.stdout.splitlines() if line}
    assert {"batches0", "batches1", "nan0", "nan1"} <= lines
    probes = [len((tmp_path / name).read_text().splitlines()) - 1 for name in ("c", "c.1")]
    assert sum(probes) == sum(len(s.trials) for s in alone.scores.values())
    assert abs(probes[0] - probes[1]) <= 3
