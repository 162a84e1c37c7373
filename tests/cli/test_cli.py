"""The command line: every command from its arguments to its exit status, on tiny saved models."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import typer

import adarank_fast as ada
from adarank_fast.cli.main import app
from adarank_fast.cli.options import parse_target_modules
from adarank_fast.training.loading import auto_class, load_pretrained
from tests.tiny_texts import WORDS, save_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> folder of a tiny model with a tokenizer; and texts."""
    root = tmp_path_factory.mktemp("models")
    found = {"texts": root / "texts.csv"}
    for kind in ("bert", "llama", "t5"):
        found[kind] = save_tiny(kind, root / kind, padding=kind != "llama")
    lines = [f"{' '.join(WORDS[i : i + 3 + i % 4])},{i % 2}" for i in range(20)]
    found["texts"].write_text("\n".join(["question,label", *lines]))
    return {kind: str(path) for kind, path in found.items()}


COMMANDS = "predict train evaluate apply bench compare plot export merge demo".split()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(adarank, command, monkeypatch):
    """On a terminal of 80 columns nothing is cut, and every option says what it is."""
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = adarank(*command.split(), "--help")
    assert (status, err) == (0, "")
    assert "Usage: " in out and "\N{HORIZONTAL ELLIPSIS}" not in out
    assert max(map(len, out.splitlines())) <= 80
    group = typer.main.get_command(app)
    assert sorted(group.commands) == sorted(COMMANDS)
    for option in (group.commands[command] if command else group).params:
        assert option.help or option.param_type_name == "argument", option.name


def test_version(adarank):
    assert adarank("--version") == (0, f"adarank-fast {ada.__version__}\n", "")


@pytest.mark.parametrize(
    "typed, completed", [("adarank pre", "predict"), ("adarank bench --max-s", "--max-seconds")]
)
def test_the_shell_completes(typed, completed):
    code = "import sys; sys.argv = ['adarank']; from adarank_fast.cli.main import main; main()"
    asked = {"_ADARANK_COMPLETE": "complete_bash", "COMP_WORDS": typed}
    asked |= {"COMP_CWORD": str(len(typed.split()) - 1), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, [completed]), done.stderr


@pytest.mark.parametrize(
    "kind, output", [("bert", "mean_pooled_hidden_state"), ("llama", "logits"), ("t5", "logits")]
)
def test_predict(adarank, folders, kind, output):
    status, out, err = adarank(
        *("predict", folders[kind], "--data", folders["texts"], "--average-rank", 3),
        *("--trials", 2, "--batch-size", 7, "-o", "mine.json"),
    )
    assert (status, err.splitlines()[-2]) == (0, "wrote mine.json")
    assert "texts.csv: 20 rows; text is column question, label is column label" in err
    plan = ada.RankPlan.load("mine.json")
    assert sum(plan.ranks.values()) == 3 * len(plan.ranks)
    assert out == plan.table() + "\n"
    assert plan.settings["output"] == output
    assert plan.settings["trials"] == 2
    assert plan.settings["batches"]["items"] == 20


def test_predict_is_what_predict_ranks_says(adarank, folders):
    from adarank_fast.training.data import read_data
    from adarank_fast.training.tokens import make_batches

    adarank("predict", folders["bert"], "--data", folders["texts"], "--trials", 2)
    model, tokenizer = load_pretrained(folders["bert"], "cpu")
    batches = make_batches(tokenizer, read_data(folders["texts"]).texts, 16, 128)
    plan = ada.predict_ranks(model, batches, trials=2, progress=False)
    assert ada.RankPlan.load("plan.json").scores == plan.scores


def test_options_arrive(adarank, folders):
    status, out, _ = adarank(
        *("predict", folders["llama"], "--data", folders["texts"], "--json"),
        *("--budget-parameters", 5000, "--target-modules", "q_proj,down_proj", "--metric", "kl"),
        *("--trials", 2, "--min-rank", 2, "--max-rank", 28, "--rank-multiple", 2, "--seed", 4),
        *("--allocation", "paper", "--samples", 5, "--max-length", 4, "--output", "logits"),
        *("--text-column", "question", "--dtype", "auto", "--device", "cpu"),
    )
    assert status == 0
    found = json.loads(out)
    settings = found["settings"]
    assert found["plan"] == "plan.json"
    assert found["ranks"] == ada.RankPlan.load("plan.json").ranks
    assert found["scores"].keys() == found["ranks"].keys()
    assert found["parameters"] <= 5000
    assert {name.rsplit(".", 1)[-1] for name in found["ranks"]} == {"q_proj", "down_proj"}
    assert {rank % 2 for rank in found["ranks"].values()} == {0}
    assert settings["batches"]["items"] == 5
    wanted = {"budget_parameters": 5000, "metric": "kl", "min_rank": 2, "max_rank": 28}
    wanted |= {"rank_multiple": 2, "seed": 4, "allocation": "paper", "output": "logits"}
    assert {key: settings[key] for key in wanted} == wanted


def test_adaptive_trials_in_bfloat16_with_a_checkpoint(adarank, folders):
    command = [
        *("predict", folders["bert"], "--data", folders["texts"], "--json", "--trials", "2-4"),
        *("--probe-dtype", "bfloat16", "--checkpoint", "c", "--max-seconds", 600),
    ]
    status, out, _ = adarank(*command)
    settings = json.loads(out)["settings"]
    assert status == 0 and settings["dtype"] == "bfloat16" and settings["max_seconds"] == 600
    assert settings["trials"] == {"minimum": 2, "maximum": 4}
    with open("c") as file:
        assert len(file.readlines()) > 2 * 8
    assert json.loads(adarank(*command)[1])["ranks"] == json.loads(out)["ranks"]


def test_torchrun(folders, tmp_path):
    """Two processes write one plan, that of one process."""
    command = ["predict", folders["bert"], "--data", folders["texts"], "--trials", "2"]
    here = os.getcwd()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([here, os.path.join(here, "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for launcher, file in ((torchrun, "two.json"), ([], "one.json")):
        subprocess.run(
            [sys.executable, "-m", *launcher, "adarank_fast", *command, "-o", tmp_path / file],
            env=environment,
            check=True,
            timeout=240,
            capture_output=True,
        )
    one, two = (ada.RankPlan.load(tmp_path / file) for file in ("one.json", "two.json"))
    assert one.ranks == two.ranks and one.settings == two.settings
    for name, score in one.scores.items():
        assert two.scores[name].trials == pytest.approx(score.trials, rel=1e-6)


def test_dry_run(adarank, folders):
    arguments = ("predict", folders["t5"], "--data", folders["texts"], "--dry-run")
    status, out, err = adarank(*arguments, "-o", "no/such/folder.json")
    assert status == 0 and "wrote" not in err
    assert "encoder.block.0.layer.0.SelfAttention.q" in out
    assert "32 x 32" in out
    assert "folded" in out
    assert "24 modules, 4 blocks, 6 groups that share an input" in out
    status, out, _ = adarank(*arguments, "--json")
    found = json.loads(out)
    assert len(found["modules"]) == found["cost"]["modules"] == 24
    assert found["modules"][0] == {
        "name": "encoder.block.0.layer.0.SelfAttention.q",
        "in_features": 32,
        "out_features": 32,
        "experts": 1,
        "block": "encoder.block.0",
        "route": "folded",
    }
    self_attention, cross_attention = [["q", "k", "v"], ["k", "v"]]
    parts = [[name.rpartition(".")[2] for name in group] for group in found["cost"]["groups"]]
    assert sorted(parts) == sorted([self_attention] * 4 + [cross_attention] * 2)
    assert not os.path.exists("plan.json")


def test_plot(adarank, folders):
    adarank("predict", folders["bert"], "--data", folders["texts"], "--trials", 2)
    status, out, err = adarank("plot", "plan.json", "-o", "a.png")
    then = "Next: adarank train MODEL --data FILE --plan plan.json"
    assert (status, out, err) == (0, "", f"wrote a.png\n{then}\n")
    with open("a.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("attention", "attention"),
        ("auto", "auto"),
        ("all-linear, experts", ["all-linear", "experts"]),
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, self.v_proj", ["q_proj", "self.v_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("layers.[0-9]{1,2}.q", "layers.[0-9]{1,2}.q"),
    ],
)
def test_parse_target_modules(text, parsed):
    assert parse_target_modules(text) == parsed


@pytest.mark.parametrize(
    "architecture, encoder_decoder, expected",
    [
        ("BertModel", False, "AutoModel"),
        ("MPNetForMaskedLM", False, "AutoModel"),
        ("T5Model", True, "AutoModel"),
        ("LlamaForCausalLM", False, "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", False, "AutoModelForCausalLM"),
        ("BartForConditionalGeneration", True, "AutoModelForSeq2SeqLM"),
        ("LlavaForConditionalGeneration", False, "AutoModelForImageTextToText"),
        (None, False, "AutoModel"),
    ],
)
def test_auto_class(architecture, encoder_decoder, expected):
    class Config:
        architectures = architecture and [architecture]
        is_encoder_decoder = encoder_decoder

    assert auto_class(Config) == expected


BERT, TEXTS = "{bert}", "{texts}"
BAD = {
    "no arguments": (["predict"], "Missing argument"),
    "no data": (["predict", BERT], "--data"),
    "no such command": (["predikt"], "No such command 'predikt'"),
    "no such option": (["predict", BERT, "--dta", "x"], "--dta"),
    "no number": (["predict", BERT, "--data", TEXTS, "--trials", "x"], "--trials"),
    "no trials": (["predict", BERT, "--data", TEXTS, "--trials", "0"], "--trials"),
    "trials range": (["predict", BERT, "--data", TEXTS, "--trials", "5-2"], "maximum=2 is below"),
    "probe dtype": (["predict", BERT, "--data", TEXTS, "--probe-dtype", "int3"], "--probe-dtype"),
    "checkpoint": (["predict", BERT, "--data", TEXTS, "--checkpoint", TEXTS], "is no checkpoint"),
    "seconds": (["predict", BERT, "--data", TEXTS, "--max-seconds", "-1"], "--max-seconds must be"),
    "too few seconds": (
        ["predict", BERT, "--data", TEXTS, "--max-seconds", "1e-6"],
        "was over before 8 of 8 modules had a trial",
    ),
    "no folder": (["predict", "./nowhere", "--data", TEXTS], "'./nowhere' is not a folder"),
    "no config": (["predict", ".", "--data", TEXTS], "no config.json"),
    "hub offline": (["predict", "some/model", "--data", TEXTS], "config of model 'some/model'"),
    "no data file": (["predict", BERT, "--data", "no.txt"], "there is no data file 'no.txt'"),
    "data suffix": (["predict", BERT, "--data", "no.bin"], "there is no data file"),
    "text column": (
        ["predict", BERT, "--data", TEXTS, "--text-column", "body"],
        "no column 'body' (--text-column); it has question, label",
    ),
    "output folder": (
        ["predict", "nowhere", "--data", "no.txt", "-o", "not/there.json"],
        "cannot write 'not/there.json': its folder does not exist; make it",
    ),
    "output is a folder": (["predict", "nowhere", "--data", "no.txt", "-o", "."], "is a folder"),
    "two budgets": (
        ["predict", BERT, "--data", TEXTS, "--average-rank", "2", "--budget-parameters", "9"],
        "--average-rank 2.0 and --budget-parameters 9 are both given; keep one of them",
    ),
    "budget": (["predict", BERT, "--data", TEXTS, "--average-rank", "-1"], "--average-rank"),
    "target modules": (
        ["predict", BERT, "--data", TEXTS, "--target-modules", "qery"],
        "'qery' matches no module; near matches: query",
    ),
    "metric": (["predict", BERT, "--data", TEXTS, "--metric", "l3"], "--metric 'l3' is unknown"),
    "output": (["predict", BERT, "--data", TEXTS, "--output", "logits"], "no output 'logits'"),
    "dtype": (["predict", BERT, "--data", TEXTS, "--dtype", "int3"], "--dtype 'int3'"),
    "device": (["predict", BERT, "--data", TEXTS, "--device", "abc"], "--device 'abc'"),
    "no plan": (["plot", "no.json"], "there is no plan file 'no.json'"),
    "not a plan": (["plot", TEXTS], "is not a JSON file"),
    "plot folder": (["plot", "no.json", "-o", "not/there.png"], "does not exist"),
    "plot into a device": (["plot", "no.json", "-o", "/dev/null"], "is no regular file"),
    "over the data": (["predict", BERT, "--data", TEXTS, "-o", TEXTS], "is read from there"),
    "over the checkpoint": (
        ["predict", BERT, "--data", TEXTS, "-o", "c", "--checkpoint", "c"],
        "cannot write 'c': 'c' is read from there; name another",
    ),
    "plot over the plan": (["plot", TEXTS, "-o", TEXTS], "is read from there"),
    "export over the plan": (["export", TEXTS, "-o", TEXTS], "is read from there"),
    "compare into the model": (
        ["compare", BERT, "--data", TEXTS, "-o", BERT],
        "is not empty and adarank-fast did not make it; name a new one",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(adarank, folders, case):
    arguments, message = BAD[case]
    filled = [folders.get(a[1:-1], a) if a[:1] == "{" else a for a in arguments]
    status, out, err = adarank(*filled)
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]  # after what was understood of the data
    assert last.startswith("adarank: error: ") and message in last
    assert err.count("error") == 1 and err.endswith("\n")
    assert not os.path.exists("plan.json")


def test_a_report_that_is_a_file_is_noticed_before_anything_is_downloaded(
    adarank, folders, monkeypatch
):
    monkeypatch.setenv("ADARANK_ASSETS", os.path.abspath("assets"))
    status, out, err = adarank("demo", "--report-dir", folders["texts"])
    assert (status, out) == (2, "")
    assert "is a file" in err and err.count("\n") == 1
    assert not os.path.exists("assets")


def test_plot_suffix(adarank, folders):
    adarank("predict", folders["bert"], "--data", folders["texts"], "--trials", 1)
    status, _, err = adarank("plot", "plan.json", "-o", "plan.xyz")
    assert status == 2
    assert "cannot draw .xyz" in err and err.count("\n") == 1


def test_bugs_keep_their_traceback(adarank, folders, monkeypatch):
    def buggy(*arguments, **options):
        raise ValueError("a bug outside the package")

    monkeypatch.setattr("adarank_fast.prediction.predict.predict_ranks", buggy)
    status, out, err = adarank("predict", folders["bert"], "--data", folders["texts"])
    assert (status, out) == (1, "")
    assert "Traceback" in err and "ValueError: a bug outside the package" in err
    assert err.splitlines()[-1] == "adarank: this is a bug; please report it with the lines above"
    # a wrong call in our own code
    monkeypatch.setattr("adarank_fast.cli.predict.parse_target_modules", lambda: None)
    status, _, err = adarank("predict", folders["bert"], "--data", folders["texts"])
    assert status == 1 and "TypeError" in err and "positional argument" in err


def test_interruption(adarank, folders, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("adarank_fast.prediction.predict.predict_ranks", interrupted)
    status, out, err = adarank("predict", folders["bert"], "--data", folders["texts"])
    assert (status, out, err.splitlines()[-1]) == (130, "", "adarank: interrupted")
    assert not os.path.exists("plan.json")
