"""Predict how much rank each module deserves: perturb it, see how far the output moves.

AdaRank, arXiv 2408.09015. For a module with weight W and bias b, trial t draws E_t and e_t with
independent N(0, 1) entries and evaluates the model with W + std(W) E_t and b + std(b) e_t, all else
unchanged. The trial's disagreement is mean |f_perturbed(x) - f(x)| over the calibration inputs and
the output's features; a module's score is the mean over trials.

The weights are never touched: a probe adds std(W) x E_t^T to what the module returns.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Unpack

import torch
from torch import nn

from adarank_fast.errors import AdarankError, AdarankTimeoutError
from adarank_fast.models.batches import Batch, batch_size, in_dtype, prepare_batches
from adarank_fast.models.forward_patching import undisturbed
from adarank_fast.models.identity import (
    digest_data,
    digest_weights,
    fingerprint,
    qualified_name,
)
from adarank_fast.models.lookups import checked_lookups
from adarank_fast.models.memory import Memory, default_memory
from adarank_fast.models.outputs import Output, choose_output
from adarank_fast.models.precision import copy_in_dtype
from adarank_fast.models.quantization import unpacked
from adarank_fast.models.targets import Target, TargetModules, find_targets, unwrap
from adarank_fast.options import DEFAULT_TARGETS, gather, refuse_unknown
from adarank_fast.plan.allocation import SharedBudget, allocate_ranks
from adarank_fast.plan.budget import Budget, BudgetOptions
from adarank_fast.plan.rank_plan import RankPlan, Score, describe_model
from adarank_fast.plan.uncertainty import AdaptiveTrials
from adarank_fast.prediction.checkpoint import OUTPUT, Checkpoint, Found
from adarank_fast.prediction.distributed import Processes
from adarank_fast.prediction.noise import Variant, measure_stds
from adarank_fast.prediction.padding import remove_padding
from adarank_fast.prediction.probe import Limits, Probe, ProbeOptions
from adarank_fast.prediction.prober import Prober
from adarank_fast.prediction.recording import CleanPasses, record_clean_passes
from adarank_fast.prediction.replay import Replay
from adarank_fast.undo import undone


class PredictOptions(BudgetOptions, ProbeOptions, total=False):
    """The options of `predict_ranks` as keywords, for type checkers."""


def predict_ranks(
    model: nn.Module,
    batches: Iterable[Batch],
    budget: Budget | float | None = None,
    target_modules: TargetModules = DEFAULT_TARGETS,
    probe: Probe | None = None,
    limits: Limits | None = None,
    progress: bool = True,
    **options: Unpack[PredictOptions],
) -> RankPlan:
    """Predict a LoRA rank for every target module, before training and without labels.

    Under `torch.distributed` (`torchrun`, `accelerate launch`) the processes share the probes out;
    each passes the same model and batches and gets the same plan.

    Args:
        model: any torch module. It is left exactly as it was, also after an exception.
        batches: dicts of the model's keyword inputs, on its device; labels are ignored.
        budget: a `Budget`, or a number: the average rank (default 8).
        target_modules: "auto" (attention, and experts where the model has them), "attention",
            "all-linear", "experts", a regex for the full name, or a list of names, suffixes and
            these words; see `find_targets`.
        probe: what is perturbed how often, and what must not move; see `Probe`.
        limits: time, memory, and a file to go on from; see `Limits`.
        progress: show a bar on stderr.
        options: fields of these three as keywords: average_rank, budget_parameters, min_rank,
            max_rank, rank_multiple, allocation, expert_rank; output, metric, trials, seed, dtype;
            checkpoint, max_seconds, max_memory.

    Returns:
        A `RankPlan` with the ranks, every trial's disagreement and all settings.

    Raises:
        AdarankError: one line that names the argument, its value and the remedy; a TypeError too
            for a wrong type, a TimeoutError if `max_seconds` was over before every module had a
            trial.
    """
    flat: dict[str, object] = {**options}
    budget, probe = gather(Budget, budget, flat), gather(Probe, probe, flat)
    limits = gather(Limits, limits, flat)
    refuse_unknown(predict_ranks, flat, Budget, Probe, Limits)
    if not isinstance(target_modules, str):
        target_modules = list(target_modules)
    return _predict(model, batches, budget, target_modules, probe, limits, progress)


def _predict(
    model: nn.Module,
    batches: Iterable[Batch],
    budget: Budget,
    target_modules: TargetModules,
    probe: Probe,
    limits: Limits,
    progress: bool,
) -> RankPlan:
    max_seconds = limits.max_seconds
    deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
    dtype = getattr(torch, probe.dtype) if isinstance(probe.dtype, str) else probe.dtype
    inner = unwrap(model)
    _check_whole(inner)
    targets = find_targets(inner, target_modules)
    sizes = {t.name: (t.in_features, t.out_features) for t in targets}
    described = describe_model(inner, targets)
    experts = described.get("experts")
    shared = SharedBudget(budget, sizes, sizes, experts)  # refuses an impossible budget at once
    prepared = prepare_batches(inner, batches)
    processes = Processes.current()
    settings = {
        **described,
        "metric": probe.metric,
        "seed": probe.seed,
        "dtype": str(dtype or next(inner.parameters()).dtype).removeprefix("torch."),
        "batches": _describe_batches(prepared),
    }
    with undisturbed(inner), unpacked(inner):
        stds = measure_stds(targets)
        probed = inner
        if dtype is not None:
            probed, prepared = copy_in_dtype(inner, dtype), in_dtype(prepared, dtype)
            targets = find_targets(probed, target_modules)
        with checked_lookups(probed):
            chosen = choose_output(probed, probe.output, prepared[0])
        settings["output"] = chosen.name
        is_compared = limits.checkpoint is not None or processes.count > 1
        identity = {
            **settings,
            "output": qualified_name(probe.output) if callable(probe.output) else chosen.name,
            "weights": digest_weights(inner) if is_compared else None,
            "targets": digest_data([sizes]),
        }
        processes.same("models or batches", identity)
        with checked_lookups(probed):
            clean = _clean_passes(probed, chosen, prepared, targets)
        memory = (
            default_memory(probed, clean.batches, clean.live_bytes, prepared)
            if limits.max_memory is None
            else Memory(limits.max_memory)
        )
        replay = Replay(clean, keep_all=callable(probe.output))
        prober = Prober(probed, replay, probe.seed, probe.metric, stds, memory)
        sampling = _Sampling(targets, probe.trials, shared, processes, deadline)
        journals: list[Checkpoint] = []

        def close() -> None:
            for journal in journals:
                journal.close()

        with undone(close):
            if limits.checkpoint:
                identity[OUTPUT] = fingerprint(clean.outputs[0])
                journals.append(Checkpoint(limits.checkpoint, identity, processes.rank))
            values = sampling.run(prober, next(iter(journals), None), progress)
    _check_trials(values, probe.trials, max_seconds)
    scores = {name: Score.from_trials(done) for name, done in values.items()}
    _warn_of_unreached(clean, scores)
    settings |= _asked_for(target_modules, budget, probe, limits)
    settings |= {"routes": prober.routes, "max_memory": memory.total}
    ranks = allocate_ranks({n: s.mean for n, s in scores.items()}, budget, sizes, experts)
    return RankPlan(ranks=ranks, scores=scores, sizes=sizes, settings=settings)


def _asked_for(
    target_modules: TargetModules, budget: Budget, probe: Probe, limits: Limits
) -> dict[str, object]:
    """The caller's choices and the versions, as the plan's settings keep them."""
    asked = {
        "target_modules": target_modules,
        "trials": probe.trials if isinstance(probe.trials, int) else vars(probe.trials),
        **budget.options,
        "versions": {name: version(name) for name in ("adarank-fast", "torch", "transformers")},
    }
    if limits.max_seconds is not None:
        asked["max_seconds"] = limits.max_seconds
    return asked


def _clean_passes(
    model: nn.Module, output: Output, batches: Sequence[Batch], targets: Sequence[Target]
) -> CleanPasses:
    """Clean passes without padding, unless the model accepts the batches only as they are."""
    parts = list(batches) if output.name == "callable" else remove_padding(model, output, batches)
    try:
        return record_clean_passes(model, output, parts, targets)
    except AdarankError:
        if all(any(part is batch for batch in batches) for part in parts):
            raise
        return record_clean_passes(model, output, batches, targets)


@dataclass(frozen=True)
class _Sampling:
    """Which probes to run, in rounds that all processes take together."""

    targets: Sequence[Target]
    trials: int | AdaptiveTrials
    budget: SharedBudget
    processes: Processes
    deadline: float

    def run(
        self, prober: Prober, file: Checkpoint | None, progress: bool
    ) -> dict[str, list[float]]:
        """Rounds until every module has its trials: module name -> disagreements, in order."""
        found = self.processes.merge(dict(file.found) if file else {}, None)
        values: dict[str, list[float]] = {target.name: [] for target in self.targets}
        _add_found(values, found)
        while variants := self._next_round(values, found):
            finished: Found = {}
            error = None
            show = progress and not self.processes.rank
            try:
                for chunk in prober.run(self.processes.share(variants), self.deadline, show):
                    new = {(variant.target.name, variant.trial): x for variant, x in chunk}
                    finished |= new
                    if file:
                        file.add(new)
            except Exception as problem:  # the other processes must not wait for this one
                error = problem
            found |= self.processes.merge(finished, error)
            _add_found(values, found)
            if any((variant.target.name, variant.trial) not in found for variant in variants):
                break  # out of time
        return values

    def _next_round(self, values: Mapping[str, Sequence[float]], found: Found) -> list[Variant]:
        """The probes that are missing; one trial of each module at a time if time is limited."""
        trials = self.trials
        if isinstance(trials, int):
            counts = dict.fromkeys(values, trials)
        elif min(map(len, values.values())) < trials.minimum:
            counts = dict.fromkeys(values, trials.minimum)
        else:
            means = {name: math.fsum(done) / len(done) for name, done in values.items()}
            counts = trials.needed(values, self.budget.real_ranks(means), self.budget.step)
        short = [t for t in self.targets if len(values[t.name]) < counts[t.name]]
        if self.deadline < math.inf and short:
            least = min(len(values[target.name]) for target in short)
            return [Variant(t, least) for t in short if len(values[t.name]) == least]
        return [
            Variant(target, trial)
            for target in short
            for trial in range(len(values[target.name]), counts[target.name])
            if (target.name, trial) not in found
        ]


def _add_found(values: Mapping[str, list[float]], found: Found) -> None:
    """Append the found trials to each module's own, up to the first that is missing."""
    for name, done in values.items():
        while (name, len(done)) in found:
            done.append(found[name, len(done)])


def _describe_batches(batches: Sequence[Batch]) -> dict[str, object]:
    """How much calibration data there was, and a digest to recognise it by."""
    items = sum(map(batch_size, batches))
    return {"count": len(batches), "items": items, "sha256": digest_data(batches)}


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


def _check_whole(model: nn.Module) -> None:
    """A sharded model would need every process in every forward."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if hasattr(tensor, "placements"):  # a DTensor
            raise AdarankError(
                f"the model is sharded ({name} is a DTensor); predict before fully_shard, each "
                "process with the whole model"
            )
        if tensor.is_meta:
            raise AdarankError(f"{name} is on the meta device; load the weights first")
