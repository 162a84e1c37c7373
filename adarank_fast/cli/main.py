"""The command `adarank`. Each command imports what it needs itself, so that `--help` is fast."""

from __future__ import annotations

import dis
import json
import logging
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from adarank_fast.cli import export as cli_export
from adarank_fast.cli import train as cli_train

if TYPE_CHECKING:
    from adarank_fast.models.targets import Target
    from adarank_fast.plan.uncertainty import AdaptiveTrials
    from adarank_fast.prediction.cost import CostEstimate

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses


LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


DTYPES = ("float32", "bfloat16", "float16", "auto")


app = typer.Typer(
    name="adarank",
    help="Mixed-rank LoRA: predict a rank for every module, before training and without labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class BadInput(ValueError):
    """Something that the user can put right; the message is one line."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0; 2 with one line on stderr for bad input; 130 after Ctrl-C.

    Bugs keep their traceback.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # peft imports them
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        status = app(args=arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:  # adarank ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _report(error)
        sys.exit(BAD_INPUT)
    if status == INTERRUPTED:  # typer may also have turned Ctrl-C into this status
        print("adarank: interrupted", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _report(error: Exception) -> None:
    """One line on stderr if the user can put it right; otherwise raise it again."""
    if hasattr(error, "format_message"):  # typer's: unknown option, missing argument
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            return
        message = f"{error.format_message().rstrip('.')}; see --help"
    elif isinstance(error, OSError) and error.errno is not None or _raised_on_purpose(error):
        message = str(error)
    else:
        raise error
    print(f"adarank: error: {' '.join(message.split())}", file=sys.stderr)


def _raised_on_purpose(error: Exception) -> bool:
    """True if a `raise` of this package made the error, and not, say, a call gone wrong in it."""
    if not isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    ours = Path(__file__).parents[1] in Path(code.co_filename).parents
    return ours and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"adarank-fast {version('adarank-fast')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def predict(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, or a name on the hub. Language models are loaded with their head.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Calibration texts, without labels: .jsonl, .csv, .tsv or .txt.",
            show_default=False,
        ),
    ],
    output_file: Annotated[
        Path, typer.Option("--output-file", "-o", help="Where to write the plan.")
    ] = Path("plan.json"),
    average_rank: Annotated[
        float | None,
        typer.Option(help="Budget: ranks a module on average.", show_default="8"),
    ] = None,
    budget_parameters: Annotated[
        int | None,
        typer.Option(help="Budget: adapter parameters, instead of --average-rank."),
    ] = None,
    target_modules: Annotated[
        str,
        typer.Option(help='"attention", "all-linear", names separated by commas, or a regex.'),
    ] = "attention",
    output: Annotated[
        str,
        typer.Option(help="What must not move: auto, pooler, last_hidden_state or logits."),
    ] = "auto",
    metric: Annotated[str, typer.Option(help="l1, tv, kl, js or argmax.")] = "l1",
    trials: Annotated[
        str,
        typer.Option(help="Perturbations of each module; 2-10: as many as its rank needs."),
    ] = "5",
    min_rank: Annotated[int, typer.Option(min=0, help="No rank below it.")] = 0,
    max_rank: Annotated[int | None, typer.Option(min=1, help="No rank above it.")] = None,
    rank_multiple: Annotated[int, typer.Option(min=1, help="Ranks are multiples of it.")] = 1,
    allocation: Annotated[
        str, typer.Option(help='"exact" spends the whole budget, "paper" rounds down.')
    ] = "exact",
    seed: Annotated[int, typer.Option(help="Of the noise and of the choice of texts.")] = 0,
    samples: Annotated[
        int,
        typer.Option(min=1, help="Use this many texts, drawn from the file; or all it has."),
    ] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts a batch.")] = 16,
    max_length: Annotated[int, typer.Option(min=1, help="Cut texts to this many tokens.")] = 128,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the texts; guessed if left out.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Load weights as {', '.join(DTYPES)}.")] = "float32",
    probe_dtype: Annotated[
        str | None,
        typer.Option(help="Run the probes in this type, such as bfloat16, on a copy."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Keep finished probes here; after a kill, go on where it was."),
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Begin no probes after this time.")
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option(help="GB that probing may hold beside the model.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show modules and cost; predict and write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")
    ] = False,
) -> None:
    """Predict a LoRA rank for every module of MODEL."""
    if average_rank is not None and budget_parameters is not None:
        raise BadInput("give --average-rank or --budget-parameters, not both")
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    if probe_dtype not in (None, *DTYPES[:3]):
        raise BadInput(f"--probe-dtype {probe_dtype!r} is unknown; use {', '.join(DTYPES[:3])}")
    counts = parse_trials(trials)
    if not dry_run:
        _check_writable(output_file)
    from adarank_fast.training.data import read_texts

    texts = read_texts(data, text_column).texts
    if samples < len(texts):
        chosen = sorted(random.Random(seed).sample(range(len(texts)), samples))
        texts = [texts[index] for index in chosen]
    with _status(f"loading {model}"):
        network, tokenizer = load(model, device, dtype, threads)
        batches = calibration_batches(network, tokenizer, texts, batch_size, max_length)
    names = parse_target_modules(target_modules)
    if dry_run:
        from adarank_fast.models.targets import find_targets
        from adarank_fast.prediction.cost import estimate_cost

        with _status("timing one forward"):
            cost = estimate_cost(network, batches, names, counts, output)
        _show_cost(find_targets(network, names), cost, as_json)
        return
    from adarank_fast.prediction.distributed import started_by_torchrun
    from adarank_fast.prediction.predict import predict_ranks

    with started_by_torchrun() as processes:
        plan = predict_ranks(
            network,
            batches,
            average_rank=average_rank,
            budget_parameters=budget_parameters,
            target_modules=names,
            output=output,
            metric=metric,
            trials=counts,
            min_rank=min_rank,
            max_rank=max_rank,
            rank_multiple=rank_multiple,
            allocation=allocation,
            seed=seed,
            dtype=None if probe_dtype is None else getattr(import_module("torch"), probe_dtype),
            checkpoint=checkpoint,
            max_seconds=max_seconds,
            max_memory=None if max_memory is None else int(max_memory * 1e9),
            progress=sys.stderr.isatty(),
        )
    if processes.rank:
        return
    plan.save(output_file)
    if as_json:
        scores = {name: {"mean": s.mean, "std": s.std} for name, s in plan.scores.items()}
        found = {"plan": str(output_file), "parameters": plan.parameters, "ranks": plan.ranks}
        print(json.dumps({**found, "scores": scores, "settings": plan.settings}))
    else:
        print(plan.table())
        print(f"wrote {output_file}", file=sys.stderr)


@app.command()
def plot(
    plan_file: Annotated[
        Path, typer.Argument(metavar="PLAN", help="A plan.json.", show_default=False)
    ],
    output_file: Annotated[
        Path, typer.Option("--output-file", "-o", help="Picture to write: .png, .pdf or .svg.")
    ] = Path("plan.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Say in JSON what was written.")] = False,
) -> None:
    """Draw a plan: disagreement by layer, and the ranks as a heat map."""
    _check_writable(output_file)
    from adarank_fast.plan.rank_plan import RankPlan
    from adarank_fast.plots.plans import plot_plan

    plot_plan(RankPlan.load(plan_file), output_file)
    if as_json:
        print(json.dumps({"plot": str(output_file)}))
    else:
        print(f"wrote {output_file}", file=sys.stderr)


@app.command()
def demo(
    report_dir: Annotated[
        Path, typer.Option(help="Folder for report.md, pictures and numbers.")
    ] = Path("report"),
    average_rank: Annotated[int, typer.Option(min=1, help="Rank of uniform LoRA.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training questions.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Training runs of each arm.")] = 3,
    items: Annotated[
        int, typer.Option(min=1, help="Train on this many of the 4,376 questions.")
    ] = 2000,
    as_json: Annotated[
        bool, typer.Option("--json", help="The numbers as JSON on stdout, and nothing else there.")
    ] = False,
) -> None:
    """Mixed ranks beside uniform LoRA: MiniLM on TREC, some minutes on a CPU, then a report."""
    from adarank_fast.cli.train import show_report
    from adarank_fast.demo.demo import run_demo

    report = run_demo(
        report_dir,
        average_rank=average_rank,
        epochs=epochs,
        seeds=seeds,
        items=items,
        quiet=as_json,
    )
    show_report(report, report_dir, as_json)


app.command()(cli_train.train)


app.command()(cli_train.compare)


def load(name: str, device: str | None, dtype: str, threads: int | None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or a hub name, in eval mode.

    Args:
        name: what is not there as a folder, and does not look like one, is a hub name.
        device: None: a GPU if there is one.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own.
        threads: CPU threads; None leaves them.

    Raises:
        BadInput: it cannot be loaded.
    """
    if os.path.exists(name) or name.startswith((".", "/", "~")):
        name = os.path.expanduser(name)
        if not os.path.isdir(name):
            raise BadInput(f"MODEL {name!r} is not a folder; give the folder of a saved model")
        if not os.path.exists(os.path.join(name, "config.json")):
            raise BadInput(f"MODEL folder {name!r} has no config.json; save_pretrained makes one")
    import torch
    import transformers

    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with _loading("config", name):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    with _loading("tokenizer", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    with _loading("weights", name):
        model = getattr(transformers, auto_class(config)).from_pretrained(
            name, dtype=dtype, trust_remote_code=False
        )
    if not getattr(model, "is_quantized", False):
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # torchrun's
        device = device or (gpu if torch.cuda.is_available() else "cpu")
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise BadInput(f"--device {device!r} cannot be used: {_first_line(error)}") from error
    return model.eval(), tokenizer


def auto_class(config: Any) -> str:
    """The transformers class to load with: language models with their head, others without."""
    architectures = getattr(config, "architectures", None) or []
    if not any(name.endswith(LANGUAGE_MODELS) for name in architectures):
        return "AutoModel"
    if getattr(config, "is_encoder_decoder", False):
        return "AutoModelForSeq2SeqLM"
    if architectures[0].endswith("ForConditionalGeneration"):  # text and images
        return "AutoModelForImageTextToText"
    return "AutoModelForCausalLM"


def calibration_batches(
    model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int, max_length: int
) -> list[dict[str, Any]]:
    """Batches on the model's device; with inputs for the decoder if there is one."""
    from adarank_fast.training.tokens import add_decoder_inputs, make_batches, pad_id

    batches = make_batches(tokenizer, texts, batch_size, max_length)
    if getattr(model.config, "is_encoder_decoder", False):
        start = getattr(model.config, "decoder_start_token_id", None)
        batches = add_decoder_inputs(batches, pad_id(tokenizer) if start is None else start)
    return [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]


def parse_trials(text: str) -> int | AdaptiveTrials:
    """ "5" -> 5; "2-10" -> AdaptiveTrials(2, 10)."""
    numbers = text.split("-")
    if not all(number.isdecimal() and int(number) for number in numbers) or len(numbers) > 2:
        raise BadInput(f"--trials {text!r} is neither a positive number nor a range such as 2-10")
    if len(numbers) == 1:
        return int(text)
    from adarank_fast.plan.uncertainty import AdaptiveTrials

    return AdaptiveTrials(int(numbers[0]), int(numbers[1]))


def parse_target_modules(text: str) -> str | list[str]:
    """Names separated by commas become a list; "attention", "all-linear" and regexes stay."""
    names = [name.strip() for name in text.split(",")]
    if text in ("attention", "all-linear") or not all(re.fullmatch(r"[\w.-]+", n) for n in names):
        return text
    return names


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Whatever goes wrong in loading files that somebody else made is bad input."""
    try:
        yield
    except Exception as error:
        where = "folder" if os.path.isdir(name) else "no such folder, so a hub name"
        raise BadInput(
            f"cannot load the {what} of MODEL {name!r} ({where}): {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise BadInput(f"-o {str(path)!r} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise BadInput(f"-o {str(path)!r}: the folder {str(path.parent)!r} does not exist; make it")
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"-o {str(path)!r}: the folder {str(path.parent)!r} cannot be written")


@contextmanager
def _status(message: str) -> Iterator[None]:
    """A spinner on stderr, on terminals only."""
    from rich.console import Console

    with Console(stderr=True).status(f"{message} ..."):
        yield


def _show_cost(targets: Sequence[Target], cost: CostEstimate, as_json: bool) -> None:
    if as_json:
        modules = [
            {
                "name": target.name,
                "in_features": target.in_features,
                "out_features": target.out_features,
                "block": target.block,
                "route": cost.routes[target.name],
            }
            for target in targets
        ]
        numbers = {key: value for key, value in vars(cost).items() if key != "routes"}
        print(json.dumps({"modules": modules, "cost": numbers}))
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("module", "in x out", "block", "group", "route"):
        table.add_column(column, overflow="fold", justify="right" if "x" in column else "left")
    group_of = {name: str(i) for i, group in enumerate(cost.groups, 1) for name in group}
    for target in targets:
        shape = f"{target.in_features} x {target.out_features}"
        group, route = group_of.get(target.name, "-"), cost.routes[target.name]
        table.add_row(target.name, shape, target.block or "-", group, route)
    show(table)
    seconds = f"{cost.seconds:.1f} s" if cost.seconds < 120 else f"{cost.seconds / 60:.0f} min"
    print(
        f"{cost.modules} modules, {cost.blocks} blocks, {len(cost.groups)} groups that share an "
        f"input, {cost.probes:,} probes: about {seconds}, "
        f"{cost.flops / 1e12:.3g} TFLOP ({cost.naive_flops / 1e12:.3g} without replay), "
        f"{cost.memory_bytes / 2**20:,.0f} MiB beside the model"
    )


def show(table: Any) -> None:
    """Print a rich table on stdout, at full width where that is no terminal."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    console = Console(width=10_000, color_system=None, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines()))


cli_export.register(app)
