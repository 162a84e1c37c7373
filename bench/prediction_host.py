"""Host time of a prediction's probe as on a card, without one: this tree beside an earlier commit.

    python -m bench.prediction_host --before 213dc16     (or `make bench-prediction-host`)

What the host of a card runs: `predict_ranks` of models with the layers and heads of real ones, but
so narrow and short that the arithmetic takes next to nothing, one thread. What depends on sizes is
decided by those of the real models in bfloat16 on the card named below: how many variants fold into
a forward, whose noise is held together, in how many chunks outputs are compared. What a forward
holds is measured with one real layer. Where a card has one kernel and a CPU many steps (attention,
comparing outputs, drawing noise) one small call of aten stands for it. Each measurement is a
process of its own; both alternate.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parent.parent
CARD = {"name": "H200", "bytes": 139 << 30, "multiprocessors": 132}
ROUNDS, REPETITIONS = 2, 3
ENCODED, WRITTEN = (64, 16), (8, 256)  # items, tokens of the real batches
SHORT = {ENCODED: (4, 2), WRITTEN: (4, 12)}  # those that run
WIDE = {  # real sizes by model; layers and heads are the same when it is narrow
    "MiniLM": ("BertModel", "BertConfig", ENCODED, dict(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        vocab_size=30522)),
    "MPNet": ("MPNetModel", "MPNetConfig", ENCODED, dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        vocab_size=30527)),
    "SmolLM2-135M": ("LlamaForCausalLM", "LlamaConfig", WRITTEN, dict(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152, head_dim=64, tie_word_embeddings=True)),
    "Qwen3-0.6B": ("Qwen3ForCausalLM", "Qwen3Config", WRITTEN, dict(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        intermediate_size=3072, vocab_size=151936, head_dim=128, tie_word_embeddings=True)),
}  # fmt: skip


def model_of(name: str, device: str, narrow: bool = False, **other: int) -> torch.nn.Module:
    kind, config, _, sizes = WIDE[name]
    sizes = sizes | other
    if narrow:
        heads = sizes["num_attention_heads"]
        sizes = sizes | dict(hidden_size=2 * heads, intermediate_size=16, vocab_size=64)
        sizes |= {"head_dim": 2} if "head_dim" in sizes else {}
    made = getattr(transformers, config)(**sizes)
    with torch.device(device):
        return getattr(transformers, kind)(made).eval().to(torch.bfloat16)


def found(*names: str) -> Any:
    """The first module that this tree has: they were moved."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(names)


class Real:
    """What the real model's sizes decide."""

    def __init__(self, name: str) -> None:
        self.size = WIDE[name][2]
        self.tokens = self.size[0] * self.size[1]
        memory = found("adarank_fast.models.memory", "adarank_fast.memory")
        model = model_of(name, "meta")
        # of one layer, which holds at its peak what many do; the head is not run
        layer = model_of(name, "cpu", num_hidden_layers=1, vocab_size=64)
        batch = {"input_ids": torch.ones(self.size, dtype=torch.long)}
        body = layer.model if self.size == WRITTEN else layer
        with torch.no_grad(), memory.LiveBytes() as live:
            body(**batch, **({"use_cache": False} if self.size == WRITTEN else {}))
        self.live = live.peak
        held = sum(p.nbytes for p in {*model.parameters()})
        least = memory.default_memory(model, [batch], [self.live], [batch])
        total = least.total
        if hasattr(memory, "free_bytes"):  # half of what a card has left
            total = max(total, (CARD["bytes"] - held) // 2)
        self.memory = memory.Memory(total)
        blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        self.blocks = list(blocks)
        linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.noise = {n: m.weight.nbytes for n, m in linears.items()}
        self.width, self.outputs = WIDE[name][3]["hidden_size"], WIDE[name][3]["vocab_size"]


def as_on_a_card(real: Real, counts: dict[str, int]) -> None:
    """Change this process's package so that real sizes decide."""
    prober = found("adarank_fast.prediction.prober", "adarank_fast.probing")
    predict = found("adarank_fast.prediction.predict", "adarank_fast.prediction")
    replay = found("adarank_fast.prediction.replay", "adarank_fast.replay").Replay
    noise = found("adarank_fast.prediction.noise", "adarank_fast.probing")
    op = found("adarank_kernels.disagreement.op", "adarank_kernels.disagreement")
    metrics = found("adarank_kernels.disagreement.metrics", "adarank_kernels._disagreement_metrics")
    kernels = found("adarank_kernels.disagreement.triton", "adarank_kernels._disagreement_launch")
    card = SimpleNamespace(device=torch.device("cuda"))
    passes = SimpleNamespace(
        outputs=[card], clean=[card], live_bytes=[real.live], live=[real.live],
        tokens=[real.tokens] if hasattr(prober, "joined_rows") else lambda index: real.tokens,
    )  # fmt: skip
    folds = prober.folds_for(passes, 0, real.memory)
    prober.folds_for = lambda clean, index, memory: folds
    counts["folds"] = folds
    if hasattr(prober, "joined_rows"):
        properties = SimpleNamespace(multi_processor_count=CARD["multiprocessors"])
        torch.cuda.get_device_properties = lambda device: properties
        rows = prober.joined_rows(card.device, *prober.block_size(real.blocks))
        short = SHORT[real.size]
        joined = rows // real.tokens * short[0] * short[1]
        prober.joined_rows = lambda *_: joined
    prober.noise_bytes = lambda target, folded=True: real.noise[target.path]
    predict.default_memory = lambda *_: real.memory
    sums = prober.disagreement_sums

    def in_pieces(outputs: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.cat([sums(piece, *rest) for piece in outputs.split(prober.COMPARED)])

    prober.disagreement_sums = in_pieces
    run = replay.run

    def counted(self: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        counts["forwards"] = counts.get("forwards", 0) + 1
        return run(self, *arguments, **options)

    replay.run = counted
    noise.philox_normal = lambda shape, key, device: torch.randn(shape)
    torch.nn.functional.scaled_dot_product_attention = attention
    compare_in_chunks(real, op, metrics, kernels)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **named: Any):
    """Depends on all three; a CPU's takes longer by the head and item than a launch does."""
    return torch.addcmul(query, key[:, :1], value[:, :1])


def compare_in_chunks(real: Real, op: Any, metrics: Any, kernels: Any) -> None:
    """As many chunks of tokens as the real outputs take on a card, compared by a kernel."""
    with_head = real.size == WRITTEN
    positions = real.tokens if with_head else real.size[0]

    def share(tokens: int, step: int) -> int:
        return max(1, tokens // -(-positions // step))

    if hasattr(op, "chunk_tokens"):
        sizes = real.width, real.outputs if with_head else None
        step_of, chunks_of = op.chunk_tokens, getattr(op, "chunks_at_once", None)

        def step(R: int, metric: str) -> int:
            return step_of("cuda", R, positions, *sizes, metric, torch.bfloat16, True)

        def chunk_tokens(device: str, R: int, tokens: int, *rest: Any) -> int:
            op.at_once = step(R, rest[2])
            return share(tokens, op.at_once)

        def chunks_at_once(device: str, R: int, *_: Any) -> int:
            return chunks_of("cuda", R, positions, *sizes, torch.bfloat16, op.at_once)

        op.chunk_tokens, op.chunks_at_once = chunk_tokens, chunks_at_once
    else:

        def chunk_tokens_before(hidden: torch.Tensor, weight: Any, *rest: Any) -> int:
            rows = len(hidden) + (rest[-1] is not None)
            width = max(real.outputs if with_head else 0, real.width)
            step = max(1, op.GPU_BYTES // (rows * width * 4))
            return share(hidden.shape[1], step)

        op._chunk_tokens = chunk_tokens_before
    compared = "has_kernel" if hasattr(metrics, "has_kernel") else "pairs_kernel"
    setattr(metrics, compared, lambda *_: True)

    def compare(f: torch.Tensor, metric: str, pairs: bool, *_: Any, **named: Any) -> torch.Tensor:
        return f.new_ones(f.shape[0] - 1, f.shape[1], dtype=torch.float64)

    kernels.compare = compare


def measure(name: str, tree: Path) -> dict[str, Any]:
    """In a process of its own, of the package in `tree`."""
    sys.path[:0] = [str(tree), str(tree / "kernels")]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import adarank_fast as ada

    assert tree in Path(str(ada.__file__)).parents, f"{ada.__file__} is not in {tree}"
    counts: dict[str, int] = {}
    real = Real(name)
    as_on_a_card(real, counts)
    written = real.size == WRITTEN
    model = model_of(name, "cpu", narrow=True).float()  # a CPU is slow in 16 bits
    ids = torch.randint(1, 60, SHORT[real.size])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options: dict[str, Any] = dict(average_rank=8, progress=False, metric="tv" if written else "l1")
    options |= dict(target_modules="all-linear" if written else "attention")
    options["trials"] = 1 if written else 5
    seconds = []
    for _ in range(REPETITIONS + 1):
        counts["forwards"] = 0
        start = time.thread_time()
        plan = ada.predict_ranks(model, [batch], **options)
        seconds.append(time.thread_time() - start)
    probes = len(plan.ranks) * options["trials"]
    return {"probes": probes, **counts, "seconds": [s / probes for s in seconds[1:]]}


def of_tree(tree: Path, name: str) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", name, str(tree)]
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def interleaved(trees: dict[str, Path], name: str) -> dict[str, Any]:
    """A row of the results: medians of each tree's predictions."""
    from statistics import median

    found: dict[str, Any] = {tree: {"seconds": []} for tree in trees}
    for _ in range(ROUNDS):
        for tree, path in trees.items():
            one = of_tree(path, name)
            found[tree] = one | {"seconds": found[tree]["seconds"] + one["seconds"]}
    for row in found.values():
        row["median_seconds"] = median(row["seconds"])
    ratio = found["now"]["median_seconds"] / found["before"]["median_seconds"]
    return found | {"now_over_before": ratio}


def git(*command: str) -> str:
    run = subprocess.run(
        ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def main(write: Callable[..., None]) -> None:
    parser = argparse.ArgumentParser(description="Host time of a probe, beside an earlier commit.")
    parser.add_argument("--before", default="213dc16", help="a commit (213dc16)")
    parser.add_argument("--only", default="", help="models named so; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as each measurement has
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        git("worktree", "add", "--detach", str(tree), options.before)
        try:
            for name in [name for name in WIDE if options.only in name]:
                rows[name] = interleaved({"before": tree, "now": ROOT}, name)
                told = {k: rows[name][k] for k in ("before", "now")}
                for which, row in told.items():
                    print(name, which, f"{row['median_seconds'] * 1e3:.3f} ms a probe,",
                          row["folds"], "folds,", row["forwards"], "forwards")  # fmt: skip
                print(name, f"{rows[name]['now_over_before']:.2f}", flush=True)
                rows[name] |= {"commit": options.before, "card": CARD["name"]}
        finally:
            git("worktree", "remove", "--force", str(tree))
    if not options.only:
        write("prediction_host", rows, keep=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
    else:
        from bench.results_file import write_results

        main(write_results)
