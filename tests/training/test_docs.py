"""Every block of docs/training.md, pasted in order into one shell and one Python."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.tiny_texts import EXAMPLES, save_tiny

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_block_runs(adarank, tmp_path):
    save_tiny("bert", tmp_path / "encoder")
    save_tiny("llama", tmp_path / "model")
    lines = [f"{text},{label}" for text, label in EXAMPLES]
    Path("reviews.csv").write_text("\n".join(["text,label", *lines]))
    rows = [{"prompt": text, "completion": f" {text[:6]}"} for text, _ in EXAMPLES]
    for name in ("answers.jsonl", "more_answers.jsonl"):
        Path(name).write_text("\n".join(map(json.dumps, rows)))
    blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 8
    names: dict[str, object] = {}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, str(PAGE), "exec"), names)
            continue
        for file, content in re.findall(r"cat > (\S+) <<END\n(.*?)END\n", block, re.S):
            Path(file).write_text(content)
        for line in re.findall(r"^adarank (.*)$", block, re.M):
            status, _, err = adarank(*shlex.split(line))
            assert status == 0, (line, err)
    assert {"adapter", "answers", "packed", "best", "predictions.jsonl"} <= {
        path.name for path in Path().iterdir()
    }
