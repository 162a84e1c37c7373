"""A user at a terminal: commands as they are typed, in a folder of their own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.tiny_texts import EXAMPLES, WORDS, save_tiny

TEMPLATE = """
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ 'word80 ' }}{% generation %}
{{- message.content + eos_token }}{% endgeneration %}
{%- else %}{{ 'word81 ' + message.content + ' ' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'word80 ' }}{% endif %}
"""


@pytest.fixture
def enter(adarank):
    """Type a command; it must succeed. Returns what it printed."""

    def run(line, *, fails=False):
        program, *arguments = shlex.split(line)
        assert program == "adarank"
        status, out, err = adarank(*arguments)
        assert status == (2 if fails else 0), err
        return err if fails else out

    return run


@pytest.fixture
def model(tmp_path):
    """The user's language model, of the chat kind; `adarank` has changed to its folder."""
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_rows(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions():
    """(question, answer) pairs."""
    return [(text, WORDS[index % 7]) for index, (text, _) in enumerate(EXAMPLES)]
