"""A run with checkpoints: it continues after an interruption, and leaves a whole result or none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, cast

from transformers import TrainerCallback

from adarank_fast.errors import AdarankError, AdarankRuntimeError
from adarank_fast.files import (
    Name,
    check_folder,
    new_folder,
    note_settings,
    own_folder,
    remove_folder,
    writing,
)
from adarank_fast.training.trainer import Training, watch_of

if TYPE_CHECKING:
    from typing import NoReturn

    from peft import PeftModel
    from torch import nn
    from tqdm import tqdm
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

KIND = "adapter"  # of folder
PLAN = "plan.json"  # the plan of the run, in its folder


def check_adapter_folder(folder: Name) -> None:
    """Raise an AdarankError unless an adapter may be written to `folder`."""
    check_folder(folder, replace=KIND)


@contextmanager
def unfinished_run(folder: Name, settings: Mapping[str, object]) -> Iterator[Path]:
    """The folder beside `folder` in which a run keeps its checkpoints, for this process alone.

    Args:
        folder: where the adapter will be.
        settings: what must be as it was for a run to go on; JSON values.

    Raises:
        AdarankError: the unfinished run there is another one, or still running.
    """
    target = Path(os.path.realpath(folder))
    for left in target.parent.glob(f"..{escape(target.name)}.unfinished.{8 * '[0-9a-f]'}.tmp"):
        shutil.rmtree(left, ignore_errors=True)  # of a kill while checkpoints were removed
    with own_folder(target.with_name(f".{target.name}.unfinished"), "unfinished run") as found:
        if last_checkpoint(found) is None and not _noted(found, settings):  # nothing to lose
            for name in ("settings.json", PLAN):
                (found / name).unlink(missing_ok=True)
        note_settings(found, settings, "an unfinished run", "finish that one or delete it")
        try:
            yield found
        finally:
            if found.exists() and not last_checkpoint(found) and not (found / PLAN).exists():
                remove_folder(found)  # an error before there was anything to go on from


def _noted(folder: Path, settings: Mapping[str, object]) -> bool:
    try:
        note_settings(folder, settings, "", "")
    except AdarankError:
        return False
    return True


def run(trainer: Trainer, checkpoints: Path) -> Training:
    """Train, or continue from the last checkpoint; the checkpoints of a diverged run are removed.

    Args:
        trainer: with a `Watch`; its output folder is `checkpoints`.
        checkpoints: see `unfinished_run`.

    Raises:
        AdarankRuntimeError: training diverged, before it was cut off or after.
    """
    with writing(checkpoints):
        trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    cast("nn.Module", trainer.model).eval()
    training = watch_of(trainer).training()
    if training.diverged:
        remove_folder(checkpoints)
        raise AdarankRuntimeError(
            f"{training.diverged}: training diverged; lower the learning rate"
        )
    return training


def finish(
    folder: Name, checkpoints: Path, peft_model: PeftModel, write: Callable[[Path], object]
) -> None:
    """Save the adapter, as a whole or not at all, and remove its checkpoints.

    Args:
        folder: an adapter that is there already is replaced.
        checkpoints: see `unfinished_run`; logs for TensorBoard move from there to `folder`.
        peft_model: trained.
        write: puts what else belongs there into the folder that it gets.
    """
    with new_folder(folder, replace=KIND) as temporary:
        peft_model.save_pretrained(str(temporary))
        write(temporary)
        if (checkpoints / "runs").is_dir():
            shutil.copytree(checkpoints / "runs", temporary / "runs")
    remove_folder(checkpoints)


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; trainer_state.json is what Trainer writes last."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(path.name.partition("-")[2]), path))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)  # cut off while it was written
    return str(max(found)[1]) if found else None


class Progress(TrainerCallback):
    """Shows steps and loss on a tqdm bar."""

    def __init__(self, bar: tqdm[NoReturn]) -> None:
        self._bar = bar

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Move the bar to the trainer's step."""
        self._bar.total, self._bar.n = state.max_steps, state.global_step
        self._bar.refresh()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Show the losses that the trainer logs, beside the bar."""
        logs = logs or {}
        shown = {name: logs[name] for name in ("loss", "eval_loss") if name in logs}
        self._bar.set_postfix({k: f"{float(v):.4g}" for k, v in shown.items()}, refresh=False)
