"""Outputs and metrics of one's own, by name: module:function, or an entry point."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import adarank_fast as ada
from adarank_fast import options
from tests.tiny_models import batch, tiny

MINE = "def last(outputs):\n    return outputs.last_hidden_state[:, -1]\n"
USES = {
    "output": (lambda name: ada.Probe(output=name).output, "adarank.outputs"),
    "metric": (lambda name: ada.Design(metric=name).metric, "adarank.metrics"),
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_by_name.py").write_text(MINE)


@pytest.mark.parametrize("argument", USES)
def test_by_module_and_function(module, argument):
    use, _ = USES[argument]
    assert use("mine_by_name:last").__name__ == "last"
    for name in ("mine_by_name:first", "no_such_module:last"):
        with pytest.raises(ada.AdarankError, match=f"{argument} '{name}': .*; give module:functio"):
            use(name)
    with pytest.raises(ada.AdarankError, match=f"{argument}.*'nonsense'"):
        use("nonsense")


@pytest.mark.parametrize("argument", USES)
def test_by_entry_point(monkeypatch, argument):
    use, group = USES[argument]

    def entry_points(group):
        return [SimpleNamespace(name="mine", load=lambda: f"from {group}")]

    monkeypatch.setattr(options, "entry_points", entry_points)
    assert use("mine") == f"from {group}"


def test_a_named_output_is_the_function(module):
    model, inputs = tiny("bert"), batch("bert")
    named = ada.predict_ranks(model, [inputs], 4, output="mine_by_name:last", trials=1)
    own: dict = {}
    exec(MINE, own)
    given = ada.predict_ranks(model, [inputs], 4, output=own["last"], trials=1)
    assert named.ranks == given.ranks
    assert {n: s.mean for n, s in named.scores.items()} == {
        n: s.mean for n, s in given.scores.items()
    }
