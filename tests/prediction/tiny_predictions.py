"""Predictions of tiny models, for the tests of this folder."""

from __future__ import annotations

import pytest

import adarank_fast as ada
from tests.tiny_models import batch, tiny


def predict(model=None, batches=None, **kwargs):
    model = model or tiny("bert")
    batches = [batch("bert")] if batches is None else batches
    return ada.predict_ranks(model, batches, **{"progress": False, "trials": 2, **kwargs})


def assert_same(first, second, rel=1e-6):
    assert first.ranks == second.ranks
    for name, score in first.scores.items():
        assert second.scores[name].trials == pytest.approx(score.trials, rel=rel)
