"""`benchmark`: what adapters cost on a user's own model and machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adarank_fast.adapters.fusion_report import fusion_report
from adarank_fast.benchmarking import arms as variants
from adarank_fast.benchmarking.arms import COMPILED, FROZEN, GRAPHED, OURS, PEFT, SAME, UNIFORM
from adarank_fast.benchmarking.figures import figures
from adarank_fast.benchmarking.graphs import graphed
from adarank_fast.benchmarking.measure import Step, peak_bytes, timed
from adarank_fast.benchmarking.report import Benchmark, Machine, Row
from adarank_fast.errors import AdarankError, AdarankTypeError
from adarank_fast.models.batches import Batch
from adarank_fast.models.precision import copy_in_dtype
from adarank_fast.models.targets import TargetModules
from adarank_fast.models.text import first_line
from adarank_fast.options import COUNT, DTYPES, check_choice, check_number
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.training.data import read_data
from adarank_fast.training.language_model import full_text, is_chat
from adarank_fast.training.loading import LANGUAGE_MODELS, calibration_batches, load_pretrained

TOLERANCE = {
    torch.float32: 1e-4,
    torch.float64: 1e-9,
}  # relative, between ours and PEFT; other dtypes: 5e-2
SMALL = 20_000_000  # models of at most this many parameters are also compared with float64
FEWEST = 32  # tokens a step
LEAST, WARM_UP = 5, 2  # there must be time for this many repetitions; calls before them
ADAPTED = 1.7  # time of a step with adapters, in steps of the frozen base, about
COMPILING = 45.0  # seconds that compiling may take


@dataclass
class _Run:
    """One benchmark under way."""

    until: float
    device: torch.device
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.until - time.perf_counter()


def benchmark(
    model: nn.Module | str | os.PathLike[str],
    plan: RankPlan | str | os.PathLike[str] | None = None,
    rank: int = 8,
    data: Mapping[str, object] | str | os.PathLike[str] | None = None,
    *,
    target_modules: TargetModules = "all-linear",
    batch_size: int = 4,
    max_length: int = 128,
    repetitions: int = 20,
    max_seconds: float = 90.0,
    compile: bool = False,
    device: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
) -> Benchmark:
    """Time training steps of the frozen base, PEFT and adarank-fast, interleaved.

    A step is forward, loss, backward and AdamW, in eval mode. For the frozen base it is forward,
    loss and the backward pass down to the embeddings, which every variant does too. Before
    anything is timed, our loss and gradients are compared with PEFT's in the same dtype, and, if
    the model is small, both with float64. A variant that differs is not timed; its row says so.
    On a GPU whole steps are timed as CUDA graphs too, over the frozen base's own graph.

    Args:
        model: a transformers model, which stays as it is; or a folder or hub name.
        plan: ranks, a `RankPlan` or its file. Ours is then also timed with uniform ranks of about
            the same sum. None: uniform LoRA of `rank`.
        rank: of the uniform plan.
        data: a file of texts (for a folder or hub name), or one batch: a dict of the model's
            keyword inputs, [B, T] each. None: random tokens.
        target_modules: of the uniform plan.
        batch_size: sequences a step.
        max_length: tokens a sequence.
        repetitions: every variant is timed at most this often.
        max_seconds: approximate time limit. Tokens and repetitions are reduced to fit it, and the
            notes say so.
        compile: also time ours through `compile_blocks`, where there is time for it.
        device: for a folder or hub name, as `adarank predict` has it.
        dtype: likewise.
        threads: likewise.

    Raises:
        AdarankError: an option out of its range, a plan that does not fit, or a model that cannot
            be benchmarked.
    """
    began = time.perf_counter()
    for name, value in (("rank", rank), ("batch_size", batch_size), ("max_length", max_length)):
        check_number(name, value)
    repetitions = check_number("repetitions", repetitions, COUNT)
    max_seconds = check_number("max_seconds", max_seconds)
    check_choice("dtype", dtype, (*DTYPES, "auto"))
    if plan is not None and not isinstance(plan, RankPlan):
        plan = RankPlan.load(plan)
    rows = None
    if data is not None and not isinstance(data, Mapping):
        if isinstance(model, nn.Module):
            raise AdarankTypeError(
                "data must be a batch (a dict of keyword inputs) for a model in memory, got "
                f"{type(data).__name__}; or give the model's folder"
            )
        rows = read_data(data).rows[:batch_size]
    batch = dict(data) if isinstance(data, Mapping) else None
    loaded: nn.Module
    if isinstance(model, nn.Module):
        loaded = model
    else:
        loaded, tokenizer = load_pretrained(os.fspath(model), device, dtype, threads)
        if rows is not None:
            texts = [full_text(row, tokenizer) for row in rows]
            special = not is_chat(rows[0])  # a template writes them
            batch = calibration_batches(loaded, tokenizer, texts, batch_size, max_length, special)[
                0
            ]
    where = next(p.device for p in loaded.parameters())
    run = _Run(began + max_seconds, where)
    with torch.enable_grad():
        return _measure(run, loaded, plan, rank, target_modules, batch, batch_size, max_length,
                        repetitions, compile)  # fmt: skip


def _measure(
    run: _Run,
    model: nn.Module,
    plan: RankPlan | None,
    rank: int,
    target_modules: TargetModules,
    given: Batch | None,
    batch_size: int,
    max_length: int,
    repetitions: int,
    compile: bool,
) -> Benchmark:
    frozen = variants.frozen_copy(model)
    mixed = plan is not None and len(set(plan.ranks.values())) > 1
    uniform = None
    if plan is None:
        plan = RankPlan.uniform(model, rank, target_modules)
    elif mixed:
        uniform = _uniform_of(plan)
    dtype = next((p.dtype for p in frozen.parameters() if p.is_floating_point()), torch.float32)
    count = 2 + (uniform is not None) + 2 * (dtype != torch.float32) + 1
    batch = _fitted(run, frozen, given, batch_size, max_length, count)
    arms = variants.make_arms(frozen, plan, uniform, dtype, batch)
    rows: dict[str, Row] = {
        name: {"adapter_parameters": sum(p.numel() for p in variants.trainable(arm))}
        for name, arm in arms.items()
    }
    _check(run, arms, batch, dtype, rows)
    steps = {
        name: variants.step_of(arm, batch) for name, arm in arms.items() if "why" not in rows[name]
    }
    for name, step in steps.items():
        step()
        rows[name]["peak_bytes"] = peak_bytes(step, run.device)
    if compile and OURS in steps:
        _add_compiled(run, arms, batch, steps, rows)
    if run.device.type == "cuda" and OURS in steps:
        _add_graphed(arms, batch, steps, rows)
    seconds = timed(steps, repetitions, max(run.left, 0.0), device=run.device, warm_up=1)
    done = len(seconds[FROZEN])
    if done < repetitions:
        run.notes.append(f"{done} of {repetitions} repetitions, to keep within max_seconds.")
    tokens = _tokens(batch)
    for name, values in seconds.items():
        rows[name] |= figures(name, seconds, tokens) | {"seconds": values}
    return Benchmark(
        {
            "model": getattr(getattr(model, "config", None), "_name_or_path", "")
            or type(model).__name__,
            "settings": {
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "shape": list(_main(batch).shape),
                "data": "given" if given is not None else "random tokens",
                "ranks": sorted(set(plan.ranks.values())),
                "modules": len(plan.ranks),
                "repetitions": done,
            },
            "machine": _machine(run.device),
            "arms": rows,
            "notes": run.notes,
        }
    )


def _uniform_of(plan: RankPlan) -> RankPlan:
    """The same modules, each with the plan's mean rank."""
    mean = max(1, round(sum(plan.ranks.values()) / len(plan.ranks)))
    ranks = {name: min(mean, *plan.sizes[name]) for name in plan.ranks}
    return RankPlan(ranks, plan.sizes, settings=plan.settings)


def _main(batch: Batch) -> Tensor:
    named = batch.get("input_ids")
    if isinstance(named, Tensor):
        return named
    return next(v for v in batch.values() if isinstance(v, Tensor) and v.dim() > 1)


def _tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) else int(_main(batch).shape[:2].numel())


def _random_batch(run: _Run, model: nn.Module, batch_size: int, length: int) -> Batch:
    model = cast("PreTrainedModel", model)  # `frozen_copy` refuses what has no embeddings
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise AdarankError(
            f"{type(model).__name__} does not read tokens; give data=, a dict of its inputs"
        )
    known = getattr(model.config, "max_position_embeddings", None) or length
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, max(1, min(length, known - 2)))  # RoBERTa's positions begin at 2
    low = min(5, embeddings.num_embeddings - 1)  # special tokens come first
    ids = torch.randint(low, embeddings.num_embeddings, shape, generator=generator)
    ids = ids.to(run.device)
    batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch


def _with_labels(model: nn.Module, batch: Batch) -> Batch:
    """A language model computes its own loss on its inputs."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if "labels" in batch or ids is None or not type(model).__name__.endswith(LANGUAGE_MODELS):
        return batch
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    rest = {key: value for key, value in batch.items() if not key.startswith("decoder_")}
    return {**rest, "labels": labels}


def _fitted(
    run: _Run,
    frozen: nn.Module,
    given: Batch | None,
    batch_size: int,
    length: int,
    count: int,
) -> Batch:
    """The batch, made smaller until the frozen base's step is fast enough for the time limit."""
    batch = given or _random_batch(run, frozen, batch_size, length)
    asked = _tokens(batch)
    while True:
        labelled = _with_labels(frozen, batch)
        step = variants.step_of(frozen, labelled)
        step()
        start = time.perf_counter()
        step()
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        took = time.perf_counter() - start
        # the checks take about two steps, the counting of bytes two more
        needed = took * ADAPTED * count * (LEAST + WARM_UP + 4)
        rows, columns = _main(batch).shape[:2]
        if needed <= run.left or rows == 1 and columns <= FEWEST:
            break
        half = (max(rows // 2, 1), columns if rows > 1 else max(columns // 2, FEWEST))
        batch = {key: _cut(value, (rows, columns), half) for key, value in batch.items()}
    if _tokens(batch) < asked:
        run.notes.append(f"{_tokens(batch)} tokens a step of {asked}, to keep within max_seconds.")
    return labelled


def _cut(value: object, shape: tuple[int, int], smaller: tuple[int, int]) -> object:
    if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != shape[0]:
        return value
    value = value[: smaller[0]]
    if value.dim() > 1 and value.shape[1] == shape[1]:
        value = value[:, : smaller[1]]
    return value.contiguous()


def _check(
    run: _Run,
    arms: Mapping[str, nn.Module],
    batch: Batch,
    dtype: torch.dtype,
    rows: dict[str, Row],
) -> None:
    """Compare our gradients with PEFT's; a variant that differs gets a "why" in its row."""
    tolerance = TOLERANCE.get(dtype, 5e-2)
    reference = None
    if sum(p.numel() for p in arms[FROZEN].parameters()) <= SMALL and dtype == torch.float32:
        exact = copy_in_dtype(arms[PEFT], torch.float64)
        for name, parameter in exact.named_parameters():
            parameter.requires_grad_("lora_" in name)
        reference = variants.gradients(exact, _in_double(batch))
    for ours, theirs in SAME.items():
        if ours not in arms:
            continue
        wanted = variants.gradients(arms[theirs], batch)
        found = variants.gradients(arms[ours], batch)
        error = variants.relative_error(found, wanted)
        rows[ours]["difference_from_peft"] = error
        if reference is not None and ours == OURS:
            rows[PEFT]["error_in_float64"] = variants.relative_error(wanted, reference)
            rows[OURS]["error_in_float64"] = variants.relative_error(found, reference)
        if not error <= tolerance:
            rows[ours]["why"] = f"gradients differ from PEFT's by {error:.2g}; please report it"
        share = fusion_report(arms[ours]).fused_share
        if share < 1:
            run.notes.append(f"{ours}: {share:.0%} of the calls fused; ada.fusion_report says why.")
    if "why" in rows[OURS] and UNIFORM in rows:
        rows[UNIFORM]["why"] = rows[OURS]["why"]


def _in_double(batch: Batch) -> Batch:
    def in_double(value: object) -> object:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {key: in_double(value) for key, value in batch.items()}


def _add_compiled(
    run: _Run,
    arms: dict[str, nn.Module],
    batch: Batch,
    steps: dict[str, Step],
    rows: dict[str, Row],
) -> None:
    """Compile and warm up. If that fails or there is no time, the row says why."""
    row = rows[COMPILED] = {"adapter_parameters": rows[OURS]["adapter_parameters"]}
    start = time.perf_counter()
    steps[OURS]()
    needed = (time.perf_counter() - start) * (len(steps) + 1) * (LEAST + WARM_UP)
    if run.left < needed + COMPILING:
        row["why"] = "no time to compile; raise max_seconds"
        return
    try:
        model = variants.compiled(arms[PEFT], batch)
        found = variants.gradients(model, batch)
        error = variants.relative_error(found, variants.gradients(arms[PEFT], batch))
        row["difference_from_peft"] = error
        dtype = next(p.dtype for p in variants.trainable(model))
        if not error <= 10 * TOLERANCE.get(dtype, 5e-2):
            row["why"] = f"gradients differ from PEFT's by {error:.2g}"
            return
        step = variants.step_of(model, batch)
        step()
    except Exception as error:  # no C++ compiler, a graph that cannot be traced: others are timed
        row["why"] = f"cannot be compiled: {first_line(error)[:120]}"
        return
    steps[COMPILED] = step


def _add_graphed(
    arms: Mapping[str, nn.Module],
    batch: Batch,
    steps: dict[str, Step],
    rows: dict[str, Row],
) -> None:
    """Whole steps as CUDA graphs; a row that says why not where one cannot be captured."""
    for name, arm in GRAPHED.items():
        rows[name] = {"adapter_parameters": rows[arm]["adapter_parameters"]}
        try:
            steps[name] = graphed(variants.shared_copy(arms[arm]), batch)
        except Exception as error:  # the others are still timed
            rows[name]["why"] = f"cannot be captured: {first_line(error)[:120]}"


def _machine(device: torch.device) -> Machine:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": {
            name: version(name) for name in ("adarank-fast", "torch", "transformers", "peft")
        },
    }
