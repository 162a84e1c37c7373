"""Finished probes in a file: not run again, and not mixed with others."""

from __future__ import annotations

import pytest

from adarank_fast.prediction.checkpoint import Checkpoint
from adarank_fast.prediction.prober import Prober
from tests.prediction.tiny_predictions import assert_same, predict
from tests.tiny_models import batch, tiny


def test_finished_probes_are_not_run_again(tmp_path, monkeypatch):
    file = tmp_path / "c"
    reference = predict()
    calls = []
    run = Prober._probe

    def interrupted(self, chunk):
        calls.append(len(chunk))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, chunk)

    monkeypatch.setattr(Prober, "_probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(checkpoint=file)
    assert calls == [8, 8, 8]
    with open(file, "a") as opened_file:
        opened_file.write('["encoder.layer.2.attention.self.query", 0, 0.0')  # cut short
    assert_same(reference, predict(checkpoint=file))
    assert calls == [8, 8, 8, 8]
    assert_same(reference, predict(checkpoint=file))
    assert len(calls) == 4
    assert_same(predict(average_rank=3), predict(checkpoint=file, average_rank=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seed=1), r"another prediction \(seed: 0, now 1\)"),
        (dict(metric="argmax"), "another prediction .metric"),
        (dict(batches=[batch("bert", seed=3)]), "another prediction .batches"),
        (dict(model=tiny("bert", layers=2)), "another prediction .weights"),
    ],
)
def test_another_predictions_checkpoint(tmp_path, change, message):
    predict(checkpoint=tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(ValueError, match=message):
        predict(checkpoint=tmp_path / "c", **change)
    assert (tmp_path / "c").read_bytes() == before


@pytest.mark.parametrize(
    "content", ["hello", "hello\n", '{"format": "adarank-fast plan"}\n', "\xff"]
)
def test_a_file_that_is_no_checkpoint_is_left_alone(tmp_path, content):
    (tmp_path / "c").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="is no checkpoint|is no text file"):
        predict(checkpoint=tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == content.encode("latin-1")
    with pytest.raises(ValueError, match="does not exist"):
        predict(checkpoint=tmp_path / "nowhere" / "c")


def test_a_header_cut_short(tmp_path):
    with Checkpoint(tmp_path / "c", {"seed": 0}) as file:
        file.add({("a", 0): 0.5})
    whole = (tmp_path / "c").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "d").write_bytes(whole[:length])
        with Checkpoint(tmp_path / "d", {"seed": 0}) as file:
            assert file.found == {}
            file.add({("b", 1): 0.25})
        with Checkpoint(tmp_path / "d", {"seed": 0}) as file:
            assert file.found == {("b", 1): 0.25}
