"""Train several arms under one parameter budget, and compare them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Unpack

from adarank_fast.comparison.design import Design, DesignOptions
from adarank_fast.comparison.folder import COMPARISON
from adarank_fast.files import check_own_folder
from adarank_fast.options import DEFAULT_TARGETS, gather, refuse_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:  # options are judged before torch is imported
    from torch import nn

    from adarank_fast.comparison.allocators import Allocator
    from adarank_fast.comparison.experiment import Given
    from adarank_fast.comparison.report import Comparison
    from adarank_fast.models.targets import TargetModules


def compare(
    model: str | os.PathLike[str] | Callable[[], nn.Module],
    train_data: Given,
    eval_data: Given | None = None,
    arms: Sequence[str | Allocator] | None = None,
    seeds: int | Sequence[int] | None = None,
    *,
    design: Design | None = None,
    target_modules: TargetModules = DEFAULT_TARGETS,
    tokenizer: PreTrainedTokenizerBase | None = None,
    modules_to_save: Sequence[str] | None = None,
    title: str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[str], object] = True,
    **options: Unpack[DesignOptions],
) -> Comparison:
    """Compare ways to share out rank: equal numbers of parameters, several seeds, one report.

    Args:
        model: a folder or hub name; or a function without arguments that makes the untrained model
            (it is called under the seed; the model takes items as keywords and returns "loss" and
            "logits").
        train_data: a file, see docs/data.md; (text, label) pairs; texts; or tokenised items (dicts
            of lists, labels included).
        eval_data: held-out data, likewise. None: a fifth of the training data is held out.
        arms: what is compared, "adarank" and "uniform" if left out; see `Design`.
        seeds: how many runs of each arm (3), with seeds from 0; or a list of seeds.
        design: what is trained, how often, and by which metric it is judged; see `Design`.
        target_modules: see `find_targets`.
        tokenizer: for texts where `model` is a function.
        modules_to_save: modules trained in full beside the adapters where `model` is a function.
        title: heads the report.
        work_dir: plans and finished cells are kept there and not made again; a new or empty folder,
            or an earlier comparison's. None: nowhere.
        progress: say on stderr what is done. A function gets a line after each run instead; an
            exception that it raises ends the comparison, with that run kept.
        options: fields of `Design` as keywords: average_rank, task, metric, greater_is_better,
            learning_rates, epochs, max_steps, batch_size, max_length, scaling, trials, dtype.

    Returns:
        The report: `.table()`, `.save(folder)`, `.results`.

    Raises:
        AdarankError: one line that names the argument, its value and the remedy. Arguments
            are judged before anything is loaded, all else before anything is trained.
    """
    flat: dict[str, object] = {**options}
    flat |= {k: v for k, v in (("arms", arms), ("seeds", seeds)) if v is not None}
    design = gather(Design, design, flat)
    refuse_unknown(compare, flat, Design)
    if work_dir is not None:
        named = (model, train_data, eval_data, *design.plan_files)
        read = [os.fspath(one) for one in named if isinstance(one, (str, os.PathLike))]
        check_own_folder(work_dir, COMPARISON, read)
    from adarank_fast.comparison.experiment import make_experiment
    from adarank_fast.comparison.runner import run

    experiment = make_experiment(
        model,
        train_data,
        eval_data,
        design.task,
        tokenizer,
        modules_to_save,
        design.max_length,
        design.dtype,
    )
    return run(design, experiment, target_modules, title, work_dir, progress)
