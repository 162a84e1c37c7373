"""Finished probes in a file: not run again, and not mixed with others."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from adarank_fast.errors import AdarankError
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


def test_another_function_of_the_outputs(tmp_path):
    class Scaled:
        def __init__(self, scale):
            self.scale = scale

        def __call__(self, outputs):
            return outputs.last_hidden_state * self.scale

    def last_token(outputs):
        return outputs.last_hidden_state[:, -1]

    def last_token_too(outputs):
        return outputs.last_hidden_state[:, -1]

    for first, second in ((Scaled(1), Scaled(100)), (last_token, last_token_too)):
        file = tmp_path / first.__class__.__name__
        before = predict(checkpoint=file, output=first)
        assert_same(before, predict(checkpoint=file, output=first))
        with pytest.raises(ValueError, match="another prediction .output"):
            predict(checkpoint=file, output=second)


def test_one_weight_of_all(tmp_path):
    model = tiny("bert")
    predict(model=model, checkpoint=tmp_path / "c")
    with torch.no_grad():
        next(model.parameters())[7, 3] += 1e-3
    with pytest.raises(ValueError, match="another prediction .weights"):
        predict(model=model, checkpoint=tmp_path / "c")


def test_the_weights_are_read_for_a_checkpoint_only(tmp_path, monkeypatch):
    def read(_):
        raise RuntimeError("read")

    monkeypatch.setattr("adarank_fast.prediction.predict.digest_weights", read)
    predict()
    with pytest.raises(RuntimeError, match="read"):
        predict(checkpoint=tmp_path / "c")


def test_the_same_weights_in_another_model(tmp_path):
    model = tiny("bert")
    predict(model=model, checkpoint=tmp_path / "c")
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.Tanh()
    with pytest.raises(ValueError, match="another prediction .output on the first batch"):
        predict(model=model, checkpoint=tmp_path / "c")


def test_one_writer_at_a_time(tmp_path):
    with Checkpoint(tmp_path / "c", {}), Checkpoint(tmp_path / "c", {}, process=1):
        for process in (0, 1):
            with pytest.raises(ValueError, match="is in use by another run"):
                Checkpoint(tmp_path / "c", {}, process)
    with Checkpoint(tmp_path / "c", {}):
        pass


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch, call):
    with Checkpoint(tmp_path / "c", {}) as file:
        file.add({("a", 0): 0.5})

        def full(opened, data=b"", write=os.write):
            if call == "write" and len(data) > 9:
                return write(opened, data[:9])  # a part of it fits
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(AdarankError, match="cannot write .*: No space left on device"):
                file.add({("b", 0): 0.25})
    with Checkpoint(tmp_path / "c", {}) as file:
        assert file.found.pop(("a", 0)) == 0.5
        assert file.found == ({} if call == "write" else {("b", 0): 0.25})
