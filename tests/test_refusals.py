"""What smaller functions refuse, each in one line; what else they take."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from adarank_fast.adapters import adapter_files
from adarank_fast.adapters.export import check_rank
from adarank_fast.adapters.graph_blocks import graph_blocks
from adarank_fast.benchmarking.report import Benchmark
from adarank_fast.benchmarking.report import _with_interval as with_interval
from adarank_fast.cli.train_options import Ranks
from adarank_fast.comparison.design import Design
from adarank_fast.errors import AdarankError
from adarank_fast.file_system import _error_number as error_number
from adarank_fast.json_values import Value
from adarank_fast.models.batches import prepare_batches
from adarank_fast.models.lookups import _checked as checked_lookup
from adarank_fast.models.text import first_line
from adarank_fast.models.text import loading as loading_files
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.plan.uncertainty import AdaptiveTrials
from adarank_fast.plots.plans import plot_disagreement
from adarank_fast.plots.style import new_figure
from adarank_fast.prediction.probe import Probe
from adarank_fast.training import language_model, loading
from adarank_fast.training.arguments import read_settings
from adarank_fast.training.data import Data, as_data, hold_out, read_data
from adarank_fast.training.data_files import read_table
from adarank_fast.training.tokens import encode_blocks, make_batches
from adarank_fast.training.trained import _task
from tests.tiny_texts import tokenizer

PLAN = RankPlan({"a.query": 3}, {"a.query": (8, 8)}, {}, {})
IDS = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)


def model_of(rows: Any, held_out: Any = None, **settings: Any) -> language_model.LanguageModel:
    return language_model.LanguageModel(rows, held_out, tokenizer(), settings)


def texts(*given: str) -> Data:
    data = as_data(given)
    assert data is not None
    return data


REFUSED: dict[str, Callable[[], object]] = {
    "shapes is empty": lambda: graph_blocks(nn.Linear(2, 2), []),
    "shapes has 7; give pairs": lambda: graph_blocks(nn.Linear(2, 2), [7]),
    "needs? .*one CUDA device": lambda: graph_blocks(nn.Linear(2, 2), [(2, 8)]),
    "rank=7 is none of": lambda: check_rank(7),
    "--average-rank and --rank each set the ranks": lambda: Ranks(average_rank=4.0, rank=8),
    "is for predicted or uniform ranks": lambda: Ranks(plan="p.json", expert_rank="divided"),
    "arms must be a list": lambda: Design(arms="adarank"),
    "two arms are called 'uniform'": lambda: Design(arms=["uniform", "uniform"]),
    "is called like an allocator; rename it": lambda: Design(
        arms=["uniform", "there/adarank.json"]
    ),
    "holds no tensor .keys: input_ids.": lambda: prepare_batches(Reader(), [{"input_ids": 3}]),
    "holds no items; leave it out": lambda: prepare_batches(
        Reader(), [{"input_ids": torch.zeros(0, 3, dtype=torch.int64)}]
    ),
    r"is on meta, the model on cpu; move it with": lambda: prepare_batches(
        Reader(), [{"input_ids": IDS["input_ids"].to("meta")}]
    ),
    "batches is empty": lambda: prepare_batches(Reader(), []),
    "no module 'a.quary'; did you mean 'a.query'": lambda: PLAN["a.quary"],
    "no scores to plot": lambda: plot_disagreement(PLAN, "x.png"),
    "too large to draw": lambda: new_figure(1e5, 4.0),
    "maximum=2 is below minimum=5; raise it": lambda: AdaptiveTrials(5, 2),
    "dtype must be a floating-point torch.dtype": lambda: Probe(dtype=torch.int8),
    "--set 'x': give name=value": lambda: read_settings("classification", pairs=["x"]),
    "and --learning-rate name one field": lambda: read_settings(
        "classification", flags={"learning_rate": 1e-3}, pairs=["learning_rate=2"]
    ),
    "output_dir cannot be set": lambda: read_settings("causal-lm", pairs=["output_dir=x"]),
    "has no such field; did you mean 'seed'": lambda: read_settings("causal-lm", pairs=["seedd=1"]),
    "packing takes true or false": lambda: read_settings("causal-lm", pairs=["packing=perhaps"]),
    "item 1: must be a text and a label": lambda: as_data([("a", "b"), ("c", "")]),
    "cannot hold 10% of 1 different": lambda: hold_out(texts("a", "a"), 0.1),
    "batch_size must be at least 1": lambda: make_batches(tokenizer(), ["a"], 0),
    "max_length must be at least 1": lambda: make_batches(tokenizer(), ["a"], 1, 0),
    "texts is empty": lambda: make_batches(tokenizer(), []),
    "makes no tokens of": lambda: make_batches(tokenizer(), ["word1", " "]),
    "make 2 tokens, less than one block of 9": lambda: encode_blocks(tokenizer(), ["word1"], 9),
    "must be a .jinja file": lambda: model_of(texts("a"), chat_template_path="x.txt"),
    "makes no tokens of the data": lambda: model_of(texts(" ")).calibration(3, torch.device("cpu")),
    "nothing to predict|anything to predict": lambda: model_of(texts("word1")).measure(
        SimpleNamespace(eval_dataset=[])  # type: ignore[arg-type]
    ),
    "no end-of-text token": lambda: language_model.make_trainer(
        nn.Linear(2, 2), SimpleNamespace(eos_token=None), [], [], SimpleNamespace(eos_token=None)
    ),
    "'x' is for TOKEN_CLS; SEQ_CLS and CAUSAL_LM are known": lambda: _task([], "TOKEN_CLS", "x"),
    "neither a classifier nor a language model": lambda: _task(["BertModel"], None, "x"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_one_line(message: str) -> None:
    with pytest.raises(AdarankError, match=message) as raised:
        REFUSED[message]()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("package", ["pandas", "bitsandbytes", "pyarrow", "datasets"])
def test_a_package_that_is_not_installed(package: str, monkeypatch, tmp_path) -> None:
    from adarank_fast.models import text
    from adarank_fast.training import data_files

    for module in (text, loading, data_files):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "state.json").write_text("{}")
    call = {
        "pandas": lambda: text.data_frame({}),
        "bitsandbytes": lambda: loading.four_bit_config(torch.bfloat16),
        "pyarrow": lambda: read_table(tmp_path / "x.parquet"),
        "datasets": lambda: read_table(tmp_path),
    }[package]
    with pytest.raises(ImportError, match=f"pip install {package}"):
        call()


def written(folder: Any, name: str, text: str) -> Any:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "[1, 2]", "must be names and values, such as"),
        ("a.json", "{", "--config .*a.json: "),
        ("a.yaml", "a: [", "--config .*a.yaml: "),
        ("a.toml", "a = 1", "--config suffix"),
    ],
)
def test_a_file_of_settings(name: str, text: str, message: str, tmp_path) -> None:
    with pytest.raises(AdarankError, match=message):
        read_settings("classification", config=written(tmp_path, name, text))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"text": "a"}, 3]', "row 2: must be a JSON object"),
        ("a.json", '[{"text": "a"}', "not JSON .* give an array of objects"),
        ("a.jsonl", '{"text": "a"}\n\n{', "line 3: not JSON .*; one object a line"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.csv", 'text,label\n"a,b\n', "check the quotes"),
        ("a.csv", "text,text\na,b\n", "two columns are called 'text'; rename one"),
        ("a.csv", "text,label\na\n", "1 fields, the header has 2"),
        ("a.parquet", "PAR1 no", "is damaged or no Parquet file"),
    ],
)
def test_a_file_of_data(name: str, text: str, message: str, tmp_path) -> None:
    with pytest.raises(AdarankError, match=message) as raised:
        read_table(written(tmp_path, name, text))
    assert "\n" not in str(raised.value)


def test_rows_of_which_something_is_missing(tmp_path) -> None:
    """They are left out, and it is said how many and why."""
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "", "completion": "b"},
        {"prompt": [], "completion": "b"},
        {"prompt": "a", "completion": None},
    ]
    path = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    data = read_data(path)
    assert len(data) == 1
    said = str(data.understood)
    assert "2 without a prompt" in said and "1 without a completion" in said
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    more = [turns[0], turns[1] | {"reasoning_content": "c"}]
    rows = [{"messages": turns}, {"messages": more}, {"messages": []}, {"messages": turns[:1]}]
    data = read_data(written(tmp_path, "b.jsonl", "\n".join(map(json.dumps, rows))))
    assert len(data) == 2
    said = str(data.understood)
    assert "1 without messages" in said and "more than role and content" in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, ""),
        ({"trainable_token_indices": [1, 2], "auto_mapping": {"a": None, "b": "c"}}, ""),
        ({"trainable_token_indices": {"embed": [1]}, "layers_to_transform": [1, 2]}, ""),
        ({"layers_to_transform": 3, "init_lora_weights": "gaussian", "bias": "all"}, ""),
        ({"lora_dropout": 0.1, "rank_pattern": {"a": 2}, "alpha_pattern": {"a": 2.5}}, ""),
        ({"target_modules": None, "target_parameters": ["experts.up"]}, ""),
        ({"trainable_token_indices": {"embed": ["1"]}}, "trainable_token_indices"),
        ({"auto_mapping": {"a": 1}}, "auto_mapping"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform"),
        ({"init_lora_weights": 1}, "init_lora_weights"),
        ({"lora_dropout": 2}, "lora_dropout"),
        ({"bias": "some"}, "bias"),
        ({"rank_pattern": {"a": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"a": "b"}}, "alpha_pattern"),
        ({"r": 0}, "r"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"target_modules": None}, "null, no names"),
        ({"megatron_config": {"a": 1}}, "adapters of Megatron are not read"),
    ],
)
def test_fields_of_an_adapters_configuration(changed: dict, message: str) -> None:
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"]}
    content = Value(plain | changed, "adapter configuration", "save it again")
    if not message:
        adapter_files._check_config(content)
        return
    with pytest.raises(AdarankError, match=message) as raised:
        adapter_files._check_config(content)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_beyond_its_table(index: int) -> None:
    table = nn.Embedding(5, 4)
    look = checked_lookup("embeddings", table, table.forward)
    assert look(torch.tensor([], dtype=torch.int64)).shape == (0, 4)
    assert look(torch.tensor([0, 4])).shape == (2, 4)
    with pytest.raises(IndexError, match=f"embeddings has 5 rows and is asked for {index}"):
        look(torch.tensor([0, index]))


def interval(low: float, high: float) -> dict[str, float]:
    return {"value": (low + high) / 2, "low": low, "high": high}


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (None, "PEFT's overhead is not above the noise here"),
        (interval(0.2, 0.9), "below PEFT's, by more than noise"),
        (interval(1.1, 1.3), "above PEFT's here: keep PEFT's layers"),
        (interval(0.9, 1.1), "No difference from PEFT's overhead"),
    ],
)
def test_what_a_benchmark_says(ratio: Any, said: str) -> None:
    row = {
        "milliseconds": interval(1, 2), "tokens_per_second": 9.0, "overhead": interval(0.1, 0.2),
        "seconds": [0.001, 0.002], "peak_bytes": 2**21,
    }  # fmt: skip
    ours = row | {"overhead_over_peft": ratio, "difference_from_peft": 1e-6}
    settings = {
        "dtype": "float32", "tokens": 16, "shape": [2, 8], "data": "random", "ranks": [8],
        "modules": 4, "repetitions": 3,
    }  # fmt: skip
    machine = {"device": "cpu", "system": "x", "threads": 1, "versions": {}}
    arms = {"frozen base": row, "PEFT": row | {"error_in_float64": 1e-7}, "ours": ours}
    arms["ours, compiled"] = {"why": "no time to compile; raise max_seconds"}
    report = Benchmark(
        {"model": "m", "settings": settings, "machine": machine, "arms": arms, "notes": ["Note."]}
    )
    table = report.table()
    assert said in " ".join(report.reading()) and "not timed" in table and "Note." in table
    assert "differ from PEFT's by 1e-06." in " ".join(report.reading())
    ours["error_in_float64"] = 2e-7
    assert "from float64 by 2e-07, PEFT's by 1e-07." in " ".join(report.reading())
    frame = report.to_frame()
    assert frame.loc["ours", "milliseconds_low"] == 1
    assert [*frame.index] == [*arms] and (frame["overhead_over_peft"].notna().sum() == 1) == bool(
        ratio
    )
    with pytest.raises(AdarankError, match="'theirs' was not benchmarked; there are frozen base"):
        report["theirs"]


def test_short_texts_of_errors_and_numbers() -> None:
    assert first_line(ValueError("  ")) == "ValueError"
    assert first_line(ValueError("\nOf a:\nb\nc")) == "Of a: b"
    assert len(first_line(ValueError("a" * 700))) == 600
    assert [error_number(error) for error in (
        OSError(errno.EIO, "x"), RuntimeError("I/O (os error 28)"),
        RuntimeError("PytorchStreamWriter failed"), ValueError("x"), OSError("x"),
    )] == [errno.EIO, 28, errno.ENOSPC, 0, 0]  # fmt: skip
    assert with_interval(interval(-200, 1000.4), 3) == "400 (-200 to 1,000)"  # type: ignore[arg-type]
    assert with_interval(interval(1, 2), 2) == "1.50 (1.00-2.00)"  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [True, False])
def test_files_that_cannot_be_loaded(code: bool, tmp_path) -> None:
    said = "pass trust_remote_code=True" if code else "no weights"
    wanted = "brings code of its own; read it" if code else "no weights"
    for name, where in ((str(tmp_path), "folder"), ("org/name", "no such folder, so a hub name")):
        with pytest.raises(AdarankError, match=wanted) as raised, loading_files("model", name):
            raise ValueError(said)
        assert where in str(raised.value)


def test_empty_lines_of_a_table_and_plain_columns(tmp_path) -> None:
    table = read_table(written(tmp_path, "a.csv", "text;label\n\na;b\n\n"))
    assert table.rows == [{"text": "a", "label": "b"}] and "semicolons" in table.notes[0]
    assert table.places == ["line 3"]
