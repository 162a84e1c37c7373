"""Check and time everything on the first GPU that someone has; one file to send back.

    python -m bench.gpu                  (or `make bench-gpu`): CUDA or ROCm, about half an hour
    python -m bench.gpu --quick          a tenth of the repetitions
    python -m bench.gpu --only blocks    the jobs whose name matches; the checks always run

Where there is no GPU it says so and exits with 0. Exit status 1: something failed its check, or did
not run; its timings are left out. The file is written anew after each job.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

from bench.gpu import kernels, ops, report, steps
from bench.gpu.checks import DTYPES, check_kernels, check_ops
from bench.gpu.context import Context, Row, measure_card
from bench.gpu.timing import Events, Graphs, Timer, reason, release

REPETITIONS, QUICK = 50, 5
TITLES = {
    "card": "The card's own rates",
    "blocks": "Training steps of one block, forward and backward",
    "kernels": "Triton kernels beside plain PyTorch",
    "ops": "Ops of a prediction",
}
Job = Callable[[Context], list[Row]]


def jobs() -> dict[str, Job]:
    """Everything there is to time: "section: row" -> what measures it."""
    found: dict[str, Job] = {}
    for section, rows, measure in (
        ("blocks", steps.ROWS, steps.block_row),
        ("kernels", kernels.GROUPS, kernels.lora_kernels),
        ("kernels", kernels.HEADS, kernels.disagreement_kernels),
        ("kernels", ("philox",), kernels.philox_kernel),
        ("ops", ops.DISAGREEMENTS, ops.disagreement_row),
        ("ops", ops.PERTURBED, ops.perturbed_row),
    ):
        for row in rows:
            name = f"{section}: {row}"
            if name in found:
                name = f"{section}: disagreement, {row}"
            found[name] = lambda context, measure=measure, row=row: measure(context, row)
    return found


def run(
    context: Context,
    chosen: dict[str, Job],
    save: Callable[[list, dict[str, list[Row]], bool], None],
    say: Callable[[str], None],
) -> int:
    """Checks, then the jobs; `save(checks, sections, finished)` after each. The exit status."""
    sections: dict[str, list[Row]] = {"card": []}
    lost = ""
    try:
        for check in check_kernels(context.device):
            context.checks.append(check)
        for check in check_ops(context.device, context.dtype_name, list(context.checks)):
            context.checks.append(check)
        say(f"{len(context.checks)} checks")
        sections["card"] = measure_card(context)
    except Exception as error:
        lost = reason(error)
        context.checks.append(
            {"op": "the card", "case": "", "kernels": "", "dtype": context.dtype_name}
            | {"share": None, "status": f"failed: {lost}"}
        )
    save(context.checks, sections, False)
    for name, job in chosen.items():
        section, _, row = name.partition(": ")
        rows: list[Row]
        say(name)
        try:
            rows = job(context) if not lost else [_failed(row, f"not run: {lost}")]
        except Exception as error:  # the other rows go on
            rows = [_failed(row, reason(error))]
        try:
            release()
        except Exception as error:  # the card no longer answers: nothing more can run
            lost = lost or f"the card was lost in {name}: {reason(error)}"
        sections.setdefault(section, []).extend(rows)
        save(context.checks, sections, False)
    save(context.checks, sections, True)
    return 1 if report.failures(context.checks, sections) else 0


def _failed(row: str, why: str) -> Row:
    return {"row": row, "variant": "all", "status": why}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench.gpu", description="Check and time everything on a GPU.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} repetitions a row")
    parser.add_argument("--out", type=Path, metavar="FILE", help="bench/results/gpu/CARD-DATE.json")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of what is timed")
    parser.add_argument("--only", metavar="PATTERN", help="jobs that match this regular expression")
    options = parser.parse_args(arguments)
    try:
        pattern = re.compile(options.only or "", re.IGNORECASE)
    except re.error as error:
        parser.error(f"--only {options.only!r} is no regular expression: {error}")
    options.jobs = {name: job for name, job in jobs().items() if pattern.search(name)}
    if not options.jobs:
        parser.error(f"--only {options.only!r} matches none of: {'; '.join(jobs())}")
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: its folder does not exist")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print(
            f"no GPU here (torch {torch.__version__} finds neither CUDA nor ROCm): nothing was "
            f"measured; it would check every kernel and op and time {len(options.jobs)} rows in "
            f"{options.dtype} into {options.out or report.default_path('card', 'date')}"
        )
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    context = Context(
        device,
        _timers,
        options.dtype,
        repetitions=QUICK if options.quick else REPETITIONS,
    )
    facts = report.card_facts(device)
    path = options.out or report.default_path(facts["card"], facts["time"][:10])
    if not options.out:
        path.parent.mkdir(parents=True, exist_ok=True)
    said = {"dtype": options.dtype, "quick": options.quick, "only": options.only}
    said |= {"repetitions": context.repetitions, "tokens": context.tokens}
    console, found = Console(), {}

    def save(checks: list, sections: dict[str, list[Row]], finished: bool) -> None:
        found.update(report.content(facts, said, checks, sections, finished))
        report.write(path, found)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        status = run(context, options.jobs, save, say)
    finally:
        if found:
            report.show(console, found, path, TITLES)
    return status


def _timers() -> list[Timer]:
    return [Events(), Graphs()]


if __name__ == "__main__":
    sys.exit(main())
