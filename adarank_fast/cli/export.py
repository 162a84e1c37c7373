"""The commands `adarank export` and `adarank merge`, and loading the model of an adapter."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from adarank_fast.adapters.export import Adapter

TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def register(app: typer.Typer) -> None:
    """Add the commands to `adarank`."""
    app.command()(export)
    app.command()(merge)


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="An adapter folder, or a plan.json.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder (adapter) or file (plan) to write; a plan's default: print it.",
            show_default=False,
        ),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="Adapter: one rank everywhere, scales folded in, to serve."),
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(help="Adapter: 8, 16, 32 or 64.", show_default="the smallest that fits"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Adapter: folder or hub name of the base model, of which only the configuration "
            "is read.",
            show_default="the adapter's",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Plan: peft, axolotl or llama-factory.", show_default="peft"),
    ] = None,
    scaling: Annotated[
        str, typer.Option(help="Plan: constant, paper, rslora, or a number: lora_alpha / rank.")
    ] = "constant",
    as_json: Annotated[bool, typer.Option("--json", help="Say in JSON what was written.")] = False,
) -> None:
    """Write an adapter that any engine serves, or a plan as a trainer's settings."""
    if not source.exists():
        raise ValueError(f"SOURCE {str(source)!r} does not exist; name an adapter folder or a plan")
    if source.is_dir():
        if format is not None:
            raise ValueError("--format is for plans; an adapter folder is exported with --uniform")
        if not uniform or output is None:
            raise ValueError("to export an adapter folder, give --uniform and -o FOLDER")
        _export_adapter(source, output, rank, base, as_json)
        return
    if uniform or rank is not None or base is not None:
        raise ValueError("--uniform, --rank and --base are for adapter folders, not plans")
    from adarank_fast.plan.rank_plan import RankPlan
    from adarank_fast.plan.trainer_formats import export_plan, render

    plan, chosen = RankPlan.load(source), format or "peft"
    if output is None:
        print(render(plan, chosen, _number(scaling)), end="")
    else:
        export_plan(plan, output, chosen, _number(scaling))
        _say({"export": str(output), "format": chosen}, as_json)


def _export_adapter(
    source: Path, output: Path, rank: int | None, base: str | None, as_json: bool
) -> None:
    from adarank_fast.adapters.export import export_saved, read_adapter

    adapter = read_adapter(source)
    with _quiet():
        skeleton, _ = base_skeleton(adapter, base, "--base")
    rank = export_saved(adapter, skeleton, output, rank)
    _say({"export": str(output), "rank": rank}, as_json)


def merge(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Folder or hub name of the base model.", show_default=False
        ),
    ],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="An adapter folder.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="New folder for the model.", show_default=False),
    ],
    dtype: Annotated[
        str, typer.Option(help="Of the merged weights: auto (MODEL's own), float32, bfloat16, ...")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Say in JSON what was written.")] = False,
) -> None:
    """Add an adapter to MODEL's weights: a plain model folder, tokenizer included."""
    from adarank_fast.adapters.export import check_fits, read_adapter
    from adarank_fast.cli.main import DTYPES
    from adarank_fast.files import new_folder

    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    with new_folder(output) as temporary, _quiet():
        found = read_adapter(adapter, only_plain=False)
        skeleton, config = base_skeleton(found, model, "MODEL")
        if not found.config.target_parameters:
            check_fits(found, skeleton)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"MODEL {model!r} is quantised: merging would round the adapter away; give the "
                "unquantised model"
            )
        merged, fresh = _merge(type(skeleton), model, config, adapter, found, dtype)
        merged.save_pretrained(temporary)
        _save_tokenizer([str(adapter), model], temporary)
    if fresh:
        print(
            f"note: neither MODEL nor the adapter has weights for {', '.join(sorted(fresh)[:4])}"
            f"{' ...' if len(fresh) > 4 else ''}; they are random",
            file=sys.stderr,
        )
    _say({"merge": str(output)}, as_json)


def base_skeleton(adapter: Adapter, name: str | None, argument: str) -> tuple[Any, Any]:
    """(the adapter's base model without weights, its configuration).

    The class is the one that has the adapter's modules: the one that the adapter names, that of its
    task, the bare model, or the checkpoint's own.

    Raises:
        ValueError: the configuration cannot be loaded, or no class fits.
    """
    import torch
    import transformers

    name = name or adapter.config.base_model_name_or_path
    if not name:
        raise ValueError(f"the adapter does not say what its base model is; give {argument}")
    name = os.path.expanduser(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        where = "folder" if os.path.isdir(name) else "no such folder, so a hub name"
        raise ValueError(
            f"cannot load the configuration of the base model {name!r} ({where}); give "
            f"{argument}: {_first_line(error)}"
        ) from error
    if labels := _label_count(adapter):
        config.num_labels = labels
    wanted = {path.replace(".base_layer", "") for path in adapter.factors}  # of experts
    for class_name in _class_names(adapter, config):
        model_class = getattr(transformers, class_name, None)
        if model_class is None:
            continue
        try:
            with torch.device("meta"):
                make = getattr(model_class, "from_config", None) or model_class._from_config
                skeleton = make(config)
        except (ValueError, RuntimeError):  # no model of that kind for this task, or none on meta
            continue
        if wanted <= {path for path, _ in skeleton.named_modules()}:
            return skeleton, config
    raise ValueError(
        f"the adapter does not fit {name!r} ({config.model_type}): no model of it has a module "
        f"{min(wanted)}"
    )


def _class_names(adapter: Adapter, config: Any) -> Iterator[str]:
    mapping = adapter.config.auto_mapping or {}
    if str(mapping.get("parent_library", "")).startswith("transformers."):
        yield str(mapping.get("base_model_class"))
    task = getattr(adapter.config.task_type, "value", adapter.config.task_type)
    if task in TASK_CLASSES:
        yield TASK_CLASSES[task]
    yield "AutoModel"
    yield from getattr(config, "architectures", None) or []


def _label_count(adapter: Adapter) -> int | None:
    """How many classes the head has that the adapter brings along, if it does."""
    heads = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
    sizes = [t.shape[0] for name, t in adapter.others.items() if name.endswith(heads)]
    return sizes[-1] if sizes else None


def _merge(
    model_class: Any, name: str, config: Any, folder: Path, adapter: Adapter, dtype: str
) -> tuple[Any, set[str]]:
    """(the merged model, names of weights that nobody had)."""
    from peft import PeftModel

    from adarank_fast.adapters.export import PREFIX

    failed = f"cannot merge {str(folder)!r} into {name!r}"
    try:
        base, info = model_class.from_pretrained(
            os.path.expanduser(name),
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head of other size: the adapter has its own
        )
        peft_model = PeftModel.from_pretrained(base, folder)
    except Exception as error:
        raise ValueError(f"{failed}: {_first_line(error)}") from error
    tied = _tied_ends(base) is not None
    _untie(base)
    try:
        merged = peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # NaN, say
        raise ValueError(f"{failed}: {_first_line(error)}") from error
    if tied:
        _say_untied(merged)
    fresh = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    return merged, fresh - {key.removeprefix(PREFIX) for key in adapter.others}


def _tied_ends(model: Any) -> tuple[Any, Any] | None:
    """(head, embedding) of a model that ties them."""
    head = model.get_output_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return None
    return head, model.get_input_embeddings()


def _untie(model: Any) -> None:
    """Give an adapted head its own copy of a weight shared with the embedding, or the reverse: what
    is merged into one must not change the other (https://github.com/huggingface/peft/issues/2018).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    ends = _tied_ends(model)
    if ends is None or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    head, embedding = (e.get_base_layer() if isinstance(e, BaseTunerLayer) else e for e in ends)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _say_untied(model: Any) -> None:
    """Loading would tie a head to the embedding again that is another tensor now."""
    import torch

    if torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight):
        return
    if getattr(model.config, "is_encoder_decoder", False):  # T5 then leaves a scaling out
        raise ValueError(
            "the adapter parts the head from the embedding whose weight it shares, which "
            f"{type(model).__name__} cannot save; train without it (target_modules) to merge"
        )
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def _save_tokenizer(folders: list[str], target: Path) -> None:
    """That of the first that has one; a model may also have none."""
    from transformers import AutoTokenizer

    for folder in folders:
        if os.path.isdir(folder) and not any(Path(folder).glob("*token*")):
            continue
        try:
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(target)
            return
        except (OSError, ValueError, KeyError):
            continue


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _number(scaling: str) -> str | float:
    try:
        return float(scaling)
    except ValueError:
        return scaling


def _say(what: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(what))
    else:
        print(f"wrote {next(iter(what.values()))}", file=sys.stderr)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, load reports and deprecations: problems are raised."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for known in (".*`?tie_word_embeddings", "Input and output embeddings are no longer tied"):
            warnings.filterwarnings("ignore", message=known)  # `_untie` sees to it
        yield
