"""Commands that write, on tiny models; each is run in a process of its own and cut off there.

A process that has this module imported forks the others (multiprocessing's fork server).
"""

from __future__ import annotations

import builtins
import errno
import gc
import importlib
import io
import json
import os
import pkgutil
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama  # noqa: F401
from peft import LoraConfig, get_peft_model

import adarank_fast as ada
from adarank_fast.cli.main import main
from tests.tiny_models import tiny
from tests.tiny_texts import EXAMPLES, save_tiny

LATE = ("matplotlib.backends.backend_agg", "pydantic.main", "scipy.stats", "typer.rich_utils")
for package in pkgutil.walk_packages(ada.__path__, "adarank_fast."):
    if not package.name.endswith("__main__"):
        importlib.import_module(package.name)
for name in LATE:  # what the jobs would import, each anew
    importlib.import_module(name)


@dataclass(frozen=True)
class Job:
    """What is run, in an empty folder beside the folder `inputs`.

    Attributes:
        run: writes into the working folder.
        kept: patterns of files that, once they are there, are there with this content at the end.
        before: puts an older result there, which must be whole until the new one replaces it.
    """

    run: Callable[[], Any]
    kept: tuple[str, ...] = ()
    before: Callable[[], Any] | None = None


def command(line: str) -> Callable[[], None]:
    return lambda: main(line.split())


def save(ranks: tuple[int, ...]) -> None:
    """Saves one of several plans over another, last the last, and what is made of it."""
    names = ["q", "k", "v"]
    sizes = {name: (8, 8) for name in names}
    for rank in ranks:
        plan = ada.RankPlan(dict.fromkeys(names, rank), sizes, {}, {})
        plan.save("plan.json")
        ada.export_plan(plan, "plan.yaml", "axolotl")
        if rank % 6 == 0:
            ada.plot_plan(plan, "plan.png")


PREDICT = "predict ../inputs/model --data ../inputs/texts.jsonl --target-modules all-linear "
TRAIN = (
    "train ../inputs/model --data ../inputs/texts.jsonl -o adapter --average-rank 2 --batch-size 4 "
    "--set save_steps=2 --set save_total_limit=2 "
)
COMPARE = (
    "compare ../inputs/model --data ../inputs/texts.jsonl -o report --average-rank 2 --seeds 2 "
    "--max-steps 3 --batch-size 8 --learning-rates 1e-3 --trials 1"
)
JOBS = {
    "predict": Job(
        command(PREDICT + "--average-rank 2 --trials 8 --checkpoint probes -o plan.json"),
        kept=("probes",),
        before=command(PREDICT + "--average-rank 4 --trials 1 -o plan.json"),
    ),
    "train": Job(
        command(TRAIN + "--max-steps 6"), before=command(TRAIN + "--max-steps 1 --seed 1")
    ),
    "compare": Job(command(COMPARE), kept=("report/cells/**/*",)),
    "export": Job(command("export ../inputs/adapter --uniform -o served")),
    "save": Job(lambda: save(tuple(range(1, 13))), before=lambda: save((18,))),
}


def make_inputs(folder: Path) -> None:
    """The model, the adapter and the texts that the jobs read."""
    save_tiny("bert", folder / "model")
    rows = [{"text": text, "label": label} for text, label in EXAMPLES[:40]]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_tiny("llama", folder / "base")
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 5},
        init_lora_weights=False,
    )
    model = get_peft_model(tiny("llama", layers=2), config)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")


class Failing:
    """Counts the calls that write beneath the working folder; the one numbered `at` fails.

    Writers outside Python are stopped by a limit on the size of files instead.
    """

    def __init__(self, at: int, number: int) -> None:
        self.count, self.at, self.number, self.root = 0, at, number, os.getcwd()
        for module, name in (
            *((os, name) for name in ("mkdir", "replace", "rename", "fsync", "write", "open")),
            *((module, "open") for module in (io, builtins)),
        ):
            setattr(module, name, self._wrapped(getattr(module, name), module is os, name))

    def _wrapped(self, original: Any, system: bool, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._writes(system, name, arguments, options):
                self.count += 1
                if self.count == self.at:
                    raise OSError(self.number, os.strerror(self.number))
            return original(*arguments, **options)

        return call

    def _writes(self, system: bool, name: str, arguments: Any, options: Any) -> bool:
        if system and name in ("fsync", "write"):
            return arguments[0] > 2
        if name == "open":
            if system:
                flags = arguments[1] if len(arguments) > 1 else options.get("flags", 0)
                if not flags & (os.O_WRONLY | os.O_RDWR):
                    return False
            else:
                mode = arguments[1] if len(arguments) > 1 else options.get("mode", "r")
                if not set(mode) & set("wax+"):
                    return False
        place = arguments[0] if arguments else options.get("file")
        return isinstance(place, (str, os.PathLike)) and os.path.abspath(place).startswith(
            self.root
        )


@dataclass(frozen=True)
class Fault:
    """What is wrong with the disk while a job runs.

    Attributes:
        at: the number of the failing call; 0: none fails.
        number: its errno.
        largest: no file can grow beyond so many bytes; -1: no limit.
    """

    at: int = 0
    number: int = errno.ENOSPC
    largest: int = -1


def work(name: str, folder: Path, said: Any, fault: Fault | None, older: bool) -> None:
    """The body of a process: run a job, or what comes before it, and exit with its status.

    Args:
        name: of the job.
        folder: to work in; temporary files go there, too.
        said: the writing end of a pipe for stderr; at the end the count of calls that write.
        fault: of the disk.
        older: run `before`.
    """
    gc.freeze()  # a collection looks at what the job makes, and not through all modules
    os.dup2(said.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(folder)
    tempfile.tempdir = str(folder)
    os.environ["COLUMNS"] = "80"
    job = JOBS[name]
    run = job.before if older else job.run
    assert run is not None
    calls = None
    if fault is not None:
        if fault.largest >= 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest, fault.largest))
        calls = Failing(fault.at, fault.number)
    status: Any = 0
    try:
        run()
    except SystemExit as end:
        status = end.code
    except ada.AdarankError as error:
        print(f"adarank: error: {error}", file=sys.stderr)
        status = 2
    if calls is not None:
        print(f"calls: {calls.count}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(int(status or 0))
