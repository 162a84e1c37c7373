"""Predict how much rank each module deserves: perturb it, see how far the output moves.

AdaRank, arXiv 2408.09015. For a module with weight W and bias b, trial t draws E_t and e_t with
independent N(0, 1) entries and evaluates the model with W + std(W) E_t and b + std(b) e_t, all else
unchanged. The trial's disagreement is mean |f_perturbed(x) - f(x)| over the calibration inputs and
the output's features; a module's score is the mean over trials.

The weights are never touched: a probe adds std(W) x E_t^T to what the module returns.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from adarank_fast.errors import AdarankError, AdarankTimeoutError, AdarankTypeError
from adarank_fast.models.batches import Batch, batch_size, in_dtype, prepare_batches, take
from adarank_fast.models.forward_patching import undisturbed
from adarank_fast.models.identity import digest_data, digest_weights
from adarank_fast.models.memory import Memory, default_memory
from adarank_fast.models.outputs import OutputChoice, choose_output
from adarank_fast.models.precision import copy_in_dtype
from adarank_fast.models.quantization import unpacked
from adarank_fast.models.targets import Target, TargetModules, find_targets, unwrap
from adarank_fast.plan.allocation import Budget, allocate_ranks
from adarank_fast.plan.rank_plan import RankPlan, Score, describe_model
from adarank_fast.plan.uncertainty import AdaptiveTrials
from adarank_fast.prediction.checkpoint import Checkpoint, Found
from adarank_fast.prediction.disagreement import check_metric
from adarank_fast.prediction.distributed import Processes
from adarank_fast.prediction.noise import Variant, measure_stds
from adarank_fast.prediction.padding import remove_padding
from adarank_fast.prediction.prober import Prober
from adarank_fast.prediction.recording import CleanPasses, record_clean_passes
from adarank_fast.prediction.replay import Replay


def predict_ranks(
    model: nn.Module,
    batches: Iterable[Batch],
    average_rank: float | None = None,
    budget_parameters: int | None = None,
    target_modules: TargetModules = "attention",
    output: OutputChoice = "auto",
    metric: str = "l1",
    trials: int | AdaptiveTrials = 5,
    min_rank: int = 0,
    max_rank: int | None = None,
    rank_multiple: int = 1,
    allocation: str = "exact",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    max_seconds: float | None = None,
    max_memory: int | None = None,
    progress: bool = True,
) -> RankPlan:
    """Predict a LoRA rank for every target module, before training and without labels.

    Under `torch.distributed` (`torchrun`, `accelerate launch`) the processes share the probes out;
    each passes the same model and batches and gets the same plan.

    Args:
        model: any torch module. It is left exactly as it was, also after an exception.
        batches: dicts of the model's keyword inputs, on its device; labels are ignored.
        average_rank: budget: this many ranks a module on average (default 8).
        budget_parameters: budget: this many adapter parameters. At most one of the two.
        target_modules: "attention", "all-linear", a regex for the full name, or a list of names or
            suffixes; see `find_targets`.
        output: what must not move: "auto" (a language model's logits if its head was loaded, else
            the mean-pooled last hidden state), "pooler", "last_hidden_state", "logits", or a
            callable that takes the model's outputs and returns a [B, ...] tensor.
        metric: "l1", "tv", "kl", "js" or "argmax"; see `disagreement_sums`.
        trials: perturbations of each module, or `AdaptiveTrials`: as many as its rank needs.
        min_rank, max_rank, rank_multiple, allocation: see `allocate_ranks`.
        seed: of the noise. The plan depends on it, not on batch sizes or the order of modules.
        dtype: run the probes in this floating-point type, on a copy of the weights; None: the
            model's own. The noise keeps the scale of the model's own weights.
        checkpoint: a file that finished probes are written to and read from: after a kill, the
            same call goes on where it was.
        max_seconds: begin no further probes after this time; every module needs one trial.
        max_memory: bytes of tensors that probing may hold beside the model, its outputs and the
            activations it resumes from; at least one variant is probed at a time. None: what keeps
            all within 1.5 times the model and one forward over the largest batch. It changes how
            fast ranks are found and, beyond rounding, not which.
        progress: show a bar on stderr.

    Returns:
        A `RankPlan` with the ranks, every trial's disagreement and all settings.

    Raises:
        AdarankError: one line that names the argument, its value and the remedy.
        AdarankTimeoutError: `max_seconds` was over before every module had a trial.
    """
    deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
    check_metric(metric)
    _check_arguments(trials, seed, dtype, max_seconds, max_memory)
    if not isinstance(target_modules, str):
        target_modules = list(target_modules)
    inner = unwrap(model)
    _check_whole(inner)
    targets = find_targets(inner, target_modules)
    sizes = {t.name: (t.in_features, t.out_features) for t in targets}
    options: dict[str, Any] = dict(
        average_rank=average_rank,
        budget_parameters=budget_parameters,
        min_rank=min_rank,
        max_rank=max_rank,
        rank_multiple=rank_multiple,
        allocation=allocation,
    )
    budget = Budget(sizes, sizes=sizes, **options)  # says no before the work
    prepared = prepare_batches(inner, batches)
    processes = Processes.current()
    settings = {
        **describe_model(inner),
        "metric": metric,
        "seed": seed,
        "dtype": str(dtype or next(inner.parameters()).dtype).removeprefix("torch."),
        "batches": _describe_batches(prepared),
    }
    with undisturbed(inner), unpacked(inner):
        stds = measure_stds(targets)
        probed = inner
        if dtype is not None:
            probed, prepared = copy_in_dtype(inner, dtype), in_dtype(prepared, dtype)
            targets = find_targets(probed, target_modules)
        chosen = choose_output(probed, output, take(prepared[0], 1))
        settings["output"] = chosen.name
        identity = {**settings, "weights": digest_weights(inner)}
        processes.same("models or batches", identity)
        parts = prepared if callable(output) else remove_padding(probed, chosen, prepared)
        clean = record_clean_passes(probed, chosen, parts, targets)
        if max_memory is None:
            memory = default_memory(probed, parts, clean.live_bytes, prepared)
        else:
            memory = Memory(max_memory)
        replay = Replay(clean, keep_all=callable(output))
        prober = Prober(probed, replay, seed, metric, stds, memory)
        sampling = _Sampling(targets, trials, budget, processes, deadline)
        journal = checkpoint and Checkpoint(checkpoint, identity, processes.rank)
        with journal or nullcontext() as file:
            values = sampling.run(prober, file, progress)
    _check_trials(values, trials, max_seconds)
    scores = {name: Score.from_trials(done) for name, done in values.items()}
    _warn_of_unreached(clean, scores)
    settings |= {
        "target_modules": target_modules,
        "trials": vars(trials) if isinstance(trials, AdaptiveTrials) else trials,
        "routes": prober.routes,
        **options,
        "versions": {name: version(name) for name in ("adarank-fast", "torch", "transformers")},
    }
    if max_seconds is not None:
        settings["max_seconds"] = max_seconds
    ranks = allocate_ranks({n: s.mean for n, s in scores.items()}, sizes=sizes, **options)
    return RankPlan(ranks=ranks, scores=scores, sizes=sizes, settings=settings)


@dataclass(frozen=True)
class _Sampling:
    """Which probes to run, in rounds that all processes take together."""

    targets: Sequence[Target]
    trials: int | AdaptiveTrials
    budget: Budget
    processes: Processes
    deadline: float

    def run(
        self, prober: Prober, file: Checkpoint | None, progress: bool
    ) -> dict[str, list[float]]:
        """Rounds until every module has its trials: module name -> disagreements, in order."""
        found = self.processes.merge(dict(file.found) if file else {}, None)
        while variants := self._next_round(found):
            finished: Found = {}
            error = None
            show = progress and not self.processes.rank
            try:
                for chunk in prober.run(self.processes.share(variants), self.deadline, show):
                    values = {(variant.target.name, variant.trial): x for variant, x in chunk}
                    finished |= values
                    if file:
                        file.add(values)
            except Exception as problem:  # the other processes must not wait for this one
                error = problem
            found |= self.processes.merge(finished, error)
            if any((variant.target.name, variant.trial) not in found for variant in variants):
                break  # out of time
        return self._by_module(found)

    def _next_round(self, found: Found) -> list[Variant]:
        """The probes that are missing; one trial of each module at a time if time is limited."""
        values, trials = self._by_module(found), self.trials
        if isinstance(trials, int):
            counts = dict.fromkeys(values, trials)
        elif min(map(len, values.values())) < trials.minimum:
            counts = dict.fromkeys(values, trials.minimum)
        else:
            means = {name: math.fsum(done) / len(done) for name, done in values.items()}
            counts = trials.needed(values, self.budget.real_ranks(means), self.budget.step)
        missing = [
            Variant(target, trial)
            for target in self.targets
            for trial in range(counts[target.name])
            if (target.name, trial) not in found
        ]
        if self.deadline < math.inf and missing:
            least = min(variant.trial for variant in missing)
            return [variant for variant in missing if variant.trial == least]
        return missing

    def _by_module(self, found: Found) -> dict[str, list[float]]:
        """Module name -> disagreements of its trials, up to the first that is missing."""
        values: dict[str, list[float]] = {}
        for target in self.targets:
            done = values[target.name] = []
            while (target.name, len(done)) in found:
                done.append(found[target.name, len(done)])
        return values


def _describe_batches(batches: Sequence[Batch]) -> dict[str, Any]:
    """How much calibration data there was, and a digest to recognise it by."""
    tensors = [{k: v for k, v in batch.items() if isinstance(v, Tensor)} for batch in batches]
    items = sum(map(batch_size, batches))
    return {"count": len(batches), "items": items, "sha256": digest_data(tensors)}


def _check_trials(
    values: Mapping[str, Sequence[float]],
    trials: int | AdaptiveTrials,
    max_seconds: float | None,
) -> None:
    """An error if a module has no trial; a warning if some have fewer than asked for."""
    missing = [name for name, done in values.items() if not done]
    if missing:
        raise AdarankTimeoutError(
            f"max_seconds={max_seconds:g} was over before {len(missing)} of {len(values)} modules "
            f"had a trial ({missing[0]}, ...); raise it, give fewer batches, or set checkpoint= "
            "and call again"
        )
    least = min(map(len, values.values()))
    if isinstance(trials, int) and least < trials:
        short = sum(len(done) < trials for done in values.values())
        warnings.warn(
            f"max_seconds={max_seconds:g}: {short} of {len(values)} modules had fewer than "
            f"{trials} trials, the least {least}",
            stacklevel=3,
        )


def _warn_of_unreached(clean: CleanPasses, scores: Mapping[str, Score]) -> None:
    unreached = [n for n, score in scores.items() if not score.mean and not clean.is_reached(n)]
    if unreached:
        warnings.warn(
            f"{len(unreached)} of {len(scores)} modules got no input from these batches "
            f"({unreached[0]}, ...), as experts that no token was sent to: their scores are 0; "
            "give more batches",
            stacklevel=3,
        )


def _check_arguments(
    trials: object,
    seed: object,
    dtype: object,
    max_seconds: float | None,
    max_memory: int | None,
) -> None:
    if not isinstance(trials, AdaptiveTrials) and (
        isinstance(trials, bool) or not isinstance(trials, int) or trials < 1
    ):
        raise AdarankError(f"trials must be a positive integer or AdaptiveTrials, got {trials!r}")
    if not isinstance(seed, int):
        raise AdarankTypeError(f"seed must be an integer, got {seed!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise AdarankTypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    if max_seconds is not None and not max_seconds > 0:
        raise AdarankError(f"max_seconds must be positive, got {max_seconds!r}")
    if max_memory is not None and not max_memory > 0:
        raise AdarankError(f"max_memory must be a positive number of bytes, got {max_memory!r}")


def _check_whole(model: nn.Module) -> None:
    """A sharded model would need every process in every forward."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):  # a DTensor
            raise AdarankError(
                f"the model is sharded ({name} is a DTensor); predict before fully_shard, each "
                "process with the whole model"
            )
        if parameter.is_meta:
            raise AdarankError(f"{name} is on the meta device; load the weights first")
