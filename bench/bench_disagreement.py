"""Eight variants through a real head: against materialising all outputs, [8, 2048, 49152].

    python -m pytest bench/bench_disagreement.py

Each measurement is a process of its own: the peak of its resident memory (VmHWM, reset after the
inputs exist and a small call has warmed the libraries up) less what was resident then, and the time
of the call. Both ways take their rounds in turn. Materialising keeps the outputs in hidden's dtype
and reduces a pair of variants at a time. The matrices must agree before any figure is kept; results
go to bench/results/disagreement.json. Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from statistics import median

import pytest
import torch
from torch import Tensor

from adarank_kernels import pairwise_disagreement
from bench.blocks import DTYPES
from bench.naive import materialised
from bench.results_file import peak_resident, write_results

K, N, D, V = 8, 2048, 576, 49152  # SmolLM2-135M's head
ROUNDS = 2
OUTPUTS_BYTES = K * N * V * 4


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A hidden state and variants 10% away from it, a head with logits of size one."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(N, D, generator=generator)
    noise = torch.randn(K, N, D, generator=generator)
    return (base + 0.1 * noise).to(dtype), torch.randn(V, D, generator=generator).div_(24).to(dtype)


def measure(way: str, metric: str, dtype: str) -> dict:
    run = pairwise_disagreement if way == "adarank_fast" else materialised
    hidden, weight = inputs(DTYPES[dtype])
    run(hidden[:, :8], weight, metric=metric)
    with peak_resident() as memory:
        start = time.perf_counter()
        found = run(hidden, weight, metric=metric)
        seconds = time.perf_counter() - start
    extra = memory[1] - memory[0]
    return {"seconds": seconds, "peak_extra_bytes": extra, "disagreement": found.tolist()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("metric", ["l1", "tv"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_disagreement(capsys, metric, dtype):
    runs: dict[str, list[dict]] = {"materialised": [], "adarank_fast": []}
    for _ in range(ROUNDS):
        for way, done in runs.items():
            command = [sys.executable, "-m", "bench.bench_disagreement", way, metric, dtype]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            done.append(json.loads(output))
    ours, theirs = (torch.tensor(runs[way][0]["disagreement"]) for way in reversed(runs))
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == "float32" else 2e-2, atol=1e-6)
    row: dict = {"K": K, "N": N, "D": D, "V": V, "outputs_float32_bytes": OUTPUTS_BYTES}
    for way, done in runs.items():
        row[f"{way}_seconds"] = [run["seconds"] for run in done]
        row[f"{way}_peak_extra_bytes"] = max(run["peak_extra_bytes"] for run in done)
    theirs, ours = (median(row[f"{way}_seconds"]) for way in runs)
    row["materialised_over_adarank_fast"] = theirs / ours
    row["peak_share_of_outputs"] = row["adarank_fast_peak_extra_bytes"] / OUTPUTS_BYTES
    with capsys.disabled():
        print(f"\n{metric} {dtype}: {row}")
        write_results("disagreement", {f"{metric} {dtype}": row})


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
