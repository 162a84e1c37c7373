"""What a prediction will cost, before it runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adarank_fast.adapters.groups import find_groups
from adarank_fast.models.batches import Batch, prepare_batches
from adarank_fast.models.forward_patching import undisturbed
from adarank_fast.models.memory import default_memory, tokens
from adarank_fast.models.outputs import OutputChoice, accepted, choose_output, small_sample
from adarank_fast.models.quantization import unpacked
from adarank_fast.models.targets import TargetModules, find_targets, unwrap
from adarank_fast.options import DEFAULT_TARGETS, check_number
from adarank_fast.plan.uncertainty import AdaptiveTrials
from adarank_fast.prediction.disagreement import disagreement_sums
from adarank_fast.prediction.folding import FOLDED
from adarank_fast.prediction.noise import noise_bytes
from adarank_fast.prediction.padding import remove_padding
from adarank_fast.prediction.prober import folds_for
from adarank_fast.prediction.recording import record_clean_passes
from adarank_fast.prediction.replay import Replay


@dataclass(frozen=True)
class CostEstimate:
    """What `predict_ranks` would do with the same arguments.

    Attributes:
        modules: how many get a rank.
        probes: (module, trial, batch) triples.
        flops: floating-point operations of all probes.
        naive_flops: those of one full forward per probe.
        seconds: at the rate of one folded forward, timed here.
        memory_bytes: noise, activations of a folded forward and clean outputs; the model not
            counted, nor what blocks return.
        blocks: blocks that a replay may skip.
        routes: module name -> "folded", or why its variants run one by one.
        groups: names of the modules that read the very same tensor, computed together in training.
        suggestion: what would be faster on this device; "" if nothing is known.
    """

    modules: int
    probes: int
    flops: int
    naive_flops: int
    seconds: float
    memory_bytes: int
    blocks: int
    routes: dict[str, str]
    groups: list[tuple[str, ...]]
    suggestion: str = ""


def estimate_cost(
    model: nn.Module,
    batches: Iterable[Batch],
    target_modules: TargetModules = DEFAULT_TARGETS,
    trials: int | AdaptiveTrials = 5,
    output: OutputChoice = "auto",
) -> CostEstimate:
    """Count the work of `predict_ranks` and time one forward, without probing anything.

    Only the largest batch is run: once clean, once folded, and small ones to find the routes. Each
    block is counted by itself, though a GPU may probe some together, and compute a little more.

    Args:
        model: as for `predict_ranks`.
        batches: as for `predict_ranks`.
        target_modules: as for `predict_ranks`.
        output: as for `predict_ranks`.
        trials: as for `predict_ranks`; of `AdaptiveTrials`, the maximum.

    Raises:
        AdarankError: as `predict_ranks`.
    """
    most = trials.maximum if isinstance(trials, AdaptiveTrials) else trials
    count: int = check_number("trials", most)
    inner = unwrap(model)
    targets = find_targets(inner, target_modules)
    prepared = prepare_batches(inner, batches)
    with undisturbed(inner), unpacked(inner):
        chosen = choose_output(inner, output, prepared[0])
        parts = prepared if callable(output) else remove_padding(inner, chosen, prepared)
        parts.sort(key=tokens, reverse=True)
        clean = record_clean_passes(inner, chosen, parts[:1], targets)
        root = clean.reader.root
        with FlopCounterMode(display=False) as counter:
            root(**accepted(root, parts[0]))
        linears = {t.name: t.path for t in targets if not t.parameter}
        small = accepted(inner, small_sample(inner, parts[0]))
        groups = find_groups(inner, linears, lambda: inner(**small))
        memory = default_memory(inner, parts[:1], clean.live_bytes, prepared)
        folds = folds_for(clean, 0, memory)
        replay = Replay(clean)
        start = time.perf_counter()
        outputs = replay.run(0, folds, {})
        disagreement_sums(outputs, clean.outputs[0], None, "l1", clean.reader.head)
        elapsed = time.perf_counter() - start
    forward = counter.get_total_flops()
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    inside = f"{chosen.root}." if chosen.root else ""
    names = (f"{type(root).__name__}.{path.removeprefix(inside)}" for path in clean.blocks)
    by_block = [by_module.get(name, 0) for name in names]
    per_item = [sum(by_block[: clean.position(t.block)]) for t in targets]
    sizes = [tokens(batch) for batch in parts]
    scale = sum(sizes) / max(sizes[0], 1)  # the other batches, by their tokens
    # a perturbed copy of experts costs no product beside the forward's own
    noise = [0 if t.parameter else 2 * sizes[0] * t.in_features * t.out_features for t in targets]
    suffixes = sum(forward - before + extra for before, extra in zip(per_item, noise, strict=True))
    flops = int((suffixes * count + forward) * scale)
    slow = sum(clean.routes[t.name] != FOLDED for t in targets) / len(targets)
    rate = forward * folds / elapsed
    in_blocks: Counter[str | None] = Counter()
    for target in targets:
        in_blocks[target.block] += count * noise_bytes(target)
    probing = min(max(in_blocks.values()), memory.noise) + folds * clean.live_bytes[0] * 5 // 4
    return CostEstimate(
        modules=len(targets),
        probes=len(targets) * count * len(prepared),
        flops=flops,
        naive_flops=int(forward * sum(map(tokens, prepared)) / sizes[0]) * len(targets) * count,
        seconds=flops / rate * (1 + slow),
        memory_bytes=probing + int(clean.outputs[0].nbytes * scale),
        blocks=len(clean.blocks),
        routes=clean.routes,
        groups=groups,
        suggestion=suggest(next(inner.parameters())),
    )


def suggest(parameter: Tensor) -> str:
    """What would make the probes of a model with this parameter faster.

    A GPU multiplies bfloat16 several times as fast as float32; a CPU seldom does.
    """
    if parameter.device.type != "cuda" or parameter.dtype != torch.float32:
        return ""
    return (
        "on a GPU probes are faster in bfloat16 (--probe-dtype bfloat16); for MiniLM and MPNet "
        "it changed no rank by more than one"
    )
