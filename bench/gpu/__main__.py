"""Check and time everything on the first GPU that someone has; one file to send back.

    python -m bench.gpu                  (or `make bench-gpu`): CUDA or ROCm, tens of minutes
    python -m bench.gpu --quick          a tenth of the repetitions
    python -m bench.gpu --only blocks    the jobs whose name matches
    python -m bench.gpu --part 1         of four, each within ten minutes: what is asked first

Where there is no GPU it says so and exits with 0. Exit status 1: something failed its check, or did
not run; its timings are left out. The file is written anew after each job.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from bench.gpu import rows

REPETITIONS, PART, QUICK = 50, 24, 5


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench.gpu", description="Check and time everything on a GPU.")
    how_often = parser.add_mutually_exclusive_group()
    how_often.add_argument("--quick", action="store_true", help=f"{QUICK} repetitions a row")
    how_often.add_argument("--repetitions", type=int, metavar="N", help=f"of a row ({REPETITIONS})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="bench/results/gpu/CARD-DATE.json")
    parser.add_argument("--dtype", choices=rows.DTYPES, default="bfloat16", help="to time")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", metavar="PATTERN", help="jobs that match this regular expression")
    which.add_argument("--part", choices=rows.PARTS, help=f"within {rows.MINUTES:g} minutes")
    parser.add_argument("--minutes", type=float, help="begin no other job after these")
    parser.add_argument("--checks", choices=("all", "kernels"), help="before anything is timed")
    options = parser.parse_args(arguments)
    pattern_of_part, checks_all = rows.PARTS.get(options.part, ("", True))
    if options.part:
        options.only = pattern_of_part
        options.minutes = options.minutes or rows.MINUTES
    options.checks = options.checks or ("all" if checks_all else "kernels")
    try:
        pattern = re.compile(options.only or "", re.IGNORECASE)
    except re.error as error:
        parser.error(f"--only {options.only!r} is no regular expression: {error}")
    options.jobs = [name for name in rows.names() if pattern.search(name)]
    if not options.jobs:
        parser.error(f"--only {options.only!r} matches none of: {'; '.join(rows.names())}")
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: its folder does not exist")
    if options.repetitions is None:
        options.repetitions = QUICK if options.quick else PART if options.part else REPETITIONS
    if options.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {options.repetitions}")
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print(
            f"no GPU here (torch {torch.__version__} finds neither CUDA nor ROCm), so nothing was "
            "measured: it would have checked every kernel and op against float64, timed "
            f"{len(options.jobs)} rows in {options.dtype} ({options.repetitions} repetitions) and "
            f"written {options.out or 'one file under bench/results/gpu/'}"
        )
        return 0
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # peft imports them
        logging.getLogger(name).setLevel(logging.ERROR)
    from bench.gpu.run import benchmark

    return benchmark(options)


if __name__ == "__main__":
    sys.exit(main())
