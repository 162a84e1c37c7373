"""Every block of README.md and of the pages in docs/ that a person writes runs, in order."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.docs.pages import ROOT, commands, pages, parse
from tests.tiny_texts import EXAMPLES, save_tiny

NAMES = [str(page.relative_to(ROOT)) for page in pages()]
RUN_BASH = {"docs/training.md", "docs/serving.md"}  # elsewhere commands are only parsed


@pytest.fixture
def readers_folder(tmp_path):
    """What the pages take for granted: two models, texts with labels, prompts with completions."""
    save_tiny("bert", tmp_path / "encoder")
    save_tiny("llama", tmp_path / "model")
    lines = [f"{text},{label}" for text, label in EXAMPLES]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *lines]))
    rows = [{"prompt": text, "completion": f" {text[:6]}"} for text, _ in EXAMPLES]
    for name in ("answers.jsonl", "more_answers.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_every_block_runs(name, adarank, readers_folder):
    def run_bash(example):
        if name not in RUN_BASH:
            return
        for file, content in re.findall(r"cat > (\S+) <<END\n(.*?)END\n", example.parsed, re.S):
            Path(file).write_text(content)
        for arguments in commands(example.parsed):
            if arguments[1] != "MODEL":
                status, _, err = adarank(*arguments)
                assert status == 0, (arguments, err)

    document = parse(ROOT / name, run_bash)
    for example in document.examples():
        example.evaluate()


def test_readme_runs_where_warnings_are_errors(tmp_path):
    """What libraries tell each other, as PEFT calling what transformers deprecates, stays there."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c"]
    alone = [*command, "from peft import LoraConfig; from transformers import LlamaForCausalLM"]
    if subprocess.run(alone, env=environment, capture_output=True).returncode:
        pytest.skip("these versions of transformers and PEFT warn when they are imported")
    command.append("\n".join(blocks))
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "adapter"}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_exists_with_its_options(name):
    from adarank_fast.cli.main import app

    group = typer.main.get_command(app)
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(), re.S):
        for arguments in commands(block):
            command = group.commands[arguments[0]]
            with command.make_context(arguments[0], arguments[1:]) as context:
                assert context.params


def test_no_block_escapes():
    """Fenced blocks say their language; without one they are what a program printed."""
    for name in NAMES:
        fences = re.findall(r"^```(.*)$", (ROOT / name).read_text(), re.M)
        assert set(fences[::2]) <= {"", "bash", "python", "toml", "text"}, name
        assert set(fences[1::2]) <= {""}, name


def test_quoted_messages_exist():
    """The messages that docs/troubleshooting.md explains are in the source."""
    folders = ROOT / "adarank_fast", ROOT / "kernels" / "adarank_kernels"
    source = "\n".join(file.read_text() for root in folders for file in root.rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals that stand one after the other
    rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert len(rows) > 20
    missing = [row for row in rows if not all(part in source for part in row.split(" ... "))]
    assert not missing
