"""Checks, then one job after the other; what fails is reported and the rest goes on."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

from bench.gpu import (
    eager,
    host,
    kernels,
    ops,
    page,
    predictions,
    profiles,
    report,
    rows,
    steps,
    training,
)
from bench.gpu.checks import Check, check_kernels, check_ops
from bench.gpu.context import Context, Row, measure_card
from bench.gpu.timing import Events, Graphs, Timer, reason, release
from bench.results_file import write_json

Sections = dict[str, list[Row]]
MEASURES: list[tuple[dict, Callable[[Context, str], list[Row]]]] = [
    (rows.BLOCKS, steps.block_row),
    (rows.GROUPS, kernels.lora_kernels),
    (rows.PAIRS, kernels.pairs_kernel),
    (rows.PHILOX, kernels.philox_kernel),
    (rows.DISAGREEMENTS, ops.disagreement_row),
    (rows.PREDICTIONS, predictions.prediction_row),
    (dict.fromkeys(rows.HOST), host.launches_row),
    (rows.EAGER, eager.eager_row),
    (rows.PROFILES, profiles.profile_row),
    (rows.TRAINING, training.training_row),
    (rows.QLORA, training.training_row),
]


def measure(context: Context, row: str) -> list[Row]:
    return next(job for names, job in MEASURES if row in names)(context, row)


def run(
    context: Context,
    jobs: Sequence[str],
    save: Callable[[list[Check], Sections, bool], None],
    say: Callable[[str], None],
    every_op: bool = True,
) -> int:
    """Checks, then the jobs; `save(checks, sections, finished)` after each. The exit status.

    Without `every_op` the kernels' own checks only; each job checks what it times all the same.
    """
    sections: Sections = {"card": []}
    lost = ""
    try:
        for check in check_kernels(context.device):
            context.checks.append(check)
        kernels_own = list(context.checks)
        for check in check_ops(context.device, context.dtype_name, kernels_own) if every_op else ():
            context.checks.append(check)
        say(f"{len(context.checks)} checks")
        sections["card"] = measure_card(context)
        release()
    except Exception as error:  # checks catch their own failures: the card itself is gone
        lost = f"the card was lost in the checks: {reason(error)}"
    save(context.checks, sections, False)
    for name in jobs:
        section, _, row = name.partition(": ")
        say(name)
        try:
            if lost or context.left < 0:
                found = [_failed(row, f"not run: {lost or report.NO_TIME}")]
            else:
                found = measure(context, row)
        except Exception as error:  # the other rows go on
            found = [_failed(row, reason(error))]
        try:
            release()
        except Exception as error:
            lost = lost or f"the card was lost in {name}: {reason(error)}"
        sections.setdefault(section, []).extend(found)
        save(context.checks, sections, False)
    save(context.checks, sections, True)
    return 1 if lost or report.failures(context.checks, sections) else 0


def _failed(row: str, why: str) -> Row:
    return {"row": row, "variant": "all", "status": why}


def timers() -> list[Timer]:
    return [Events(), Graphs()]


def benchmark(options: argparse.Namespace) -> int:
    """Everything that `options` ask for, on the current card; the page's section and the file."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision("highest")  # no TF32 in the references
    context = Context(device, timers, options.dtype, options.repetitions)
    if options.minutes is not None:
        context.until = time.perf_counter() + 60 * options.minutes
    facts = report.card_facts(device)
    part = f"-part-{options.part}" if options.part else ""
    path = options.out or report.default_path(facts["card"], facts["time"][:10] + part)
    said = {"dtype": options.dtype, "quick": options.quick, "only": options.only}
    said |= {"part": options.part, "every op checked": options.checks == "all"}
    said |= {"repetitions": context.repetitions, "tokens": context.tokens}
    found: dict = {}

    def save(checks: list[Check], sections: Sections, finished: bool) -> None:
        found.update(report.content(facts, said, checks, sections, finished))
        write_json(path, found)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        return run(context, options.jobs, save, say, options.checks == "all")
    finally:  # also after Ctrl-C
        if found:
            print(page.card(found), *report.notes(found["sections"]), sep="\n")
            state = "written to" if found["finished"] else "not finished; what there is is in"
            print(f"{state} {path}")
