"""The demo on a tiny encoder and made-up texts."""

from __future__ import annotations

import pytest

from adarank_fast.demo import assets, demo
from tests.tiny_texts import EXAMPLES, save_tiny


def test_demo(tmp_path, monkeypatch):
    folder = save_tiny("bert", tmp_path / "bert")
    monkeypatch.setattr(assets, "minilm", lambda: folder)
    monkeypatch.setattr(assets, "trec", lambda fine: (EXAMPLES[:40], EXAMPLES[40:]))
    options = dict(average_rank=2, epochs=1, seeds=2, items=32, quiet=True)
    made = demo.run_demo(tmp_path / "report", **options)
    settings = made.results["settings"]
    assert (settings["train_items"], settings["held_out_items"]) == (32, 20)
    assert list(made.results["arms"]) == ["adarank", "uniform"]
    assert len(made.results["sweep"]) == 4
    assert str(tmp_path) not in (tmp_path / "report" / "results.json").read_text()
    assert "TREC" in (tmp_path / "report" / "report.md").read_text()
    assert demo.run_demo(tmp_path / "report", **options).results == made.results


def test_report_folder_that_cannot_be(tmp_path, monkeypatch):
    for name in ("minilm", "trec"):
        monkeypatch.setattr(assets, name, lambda **_: pytest.fail("downloaded too early"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        demo.run_demo(tmp_path / "file")
