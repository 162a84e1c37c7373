"""What an experiment is made of: which data go together, and what is set aside."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from adarank_fast.comparison.experiment import make_experiment, split_validation, try_metric
from adarank_fast.comparison.metrics import user_metric
from adarank_fast.errors import AdarankError
from tests.comparison.comparisons import encoder
from tests.tiny_texts import EXAMPLES

LABELLED = [{"input_ids": [1, 2, i], "labels": i % 3} for i in range(8)]
LANGUAGE = [{"input_ids": [1, 2, i], "labels": [1, 2, i]} for i in range(8)]


def experiment_of(train: Any, held_out: Any, task: str = "auto") -> Any:
    return make_experiment(encoder, train, held_out, task, None, None, 16, "float32")


@pytest.mark.parametrize(
    ("items", "task", "classes"),
    [(LABELLED, "classification", 3), (LANGUAGE, "causal-lm", None)],
)
def test_tokenised_items_say_their_task(items: Any, task: str, classes: int | None) -> None:
    for asked in ("auto", task):
        found = experiment_of(items, items[:2], asked)
        assert (found.task, found.classes) == (task, classes)
        assert found.train == items and found.held_out == items[:2]


@pytest.mark.parametrize(
    ("train", "held_out", "task", "message"),
    [
        (LABELLED, None, "auto", "tokenised train_data need eval_data"),
        (LABELLED, EXAMPLES, "auto", "both be texts or both tokenised"),
        (EXAMPLES, LABELLED, "auto", "both be texts or both tokenised"),
        (LABELLED, LABELLED, "causal-lm", "'causal-lm' does not go with labels like 0"),
        (LANGUAGE, LANGUAGE, "classification", r"does not go with labels like \[1, 2, 0\]"),
    ],
)
def test_data_that_do_not_go_together(train: Any, held_out: Any, task: str, message: str) -> None:
    with pytest.raises(AdarankError, match=message):
        experiment_of(train, held_out, task)


def test_items_of_the_same_tokens_are_set_aside_together() -> None:
    items = LABELLED * 3
    train, validation = split_validation(items)
    assert len(train) + len(validation) == 24
    assert not {str(i["input_ids"]) for i in train} & {str(i["input_ids"]) for i in validation}
    with pytest.raises(AdarankError, match="3 training items are too few"):
        split_validation(LABELLED[:1] * 3)


def test_a_metric_is_tried_on_predictions_of_the_kind_of_the_task() -> None:
    """Tokens for a language model, a score for each class for a classifier."""
    seen: list[numpy.ndarray] = []

    def metric(predictions: numpy.ndarray, labels: numpy.ndarray) -> float:
        assert labels.shape == predictions.shape[:1]
        seen.append(predictions)
        return 0.5

    for items in (LANGUAGE, LABELLED):
        experiment = experiment_of(items, items)
        assert try_metric(user_metric(metric, True), experiment) == 0.5
    assert [one.shape for one in seen] == [(16,), (16,), (8, 3), (8, 3)]  # each but the first token
