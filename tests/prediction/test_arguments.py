"""What a user may get wrong: one line that names the argument, the value and the remedy."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from tests.prediction.tiny_predictions import predict
from tests.tiny_models import batch, rows, tiny


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batches=[]), "batches is empty"),
        (dict(batches=[{}]), r"batches\[0\] holds no tensor"),
        (dict(batches=[torch.ones(2)]), r"batches\[0\] must be a dict .* got Tensor"),
        (dict(batches=[{"input_idz": torch.ones(2, 3).long()}]), "did you mean 'input_ids'"),
        (dict(batches=[{"attention_mask": torch.ones(2, 3)}]), "the model rejects the first"),
        (dict(batches=[rows(batch("bert"), 0, 0)]), r"batches\[0\] holds no items"),
        (dict(batches=[{"input_ids": torch.full((1, 3), 999)}]), "the model rejects the first"),
        (
            dict(batches=[{"input_ids": torch.ones(2, 3, device="meta").long()}]),
            "is on meta, the model on cpu",
        ),
        (dict(metric="l2"), "metric='l2' is unknown; use one of l1, tv"),
        (dict(output="hidden"), "output='hidden' is unknown"),
        (dict(output="logits"), "no output 'logits' .*last_hidden_state, pooler_output"),
        (dict(output=lambda o: 3), "must give a tensor with a row per item, got int"),
        (dict(output=lambda o: o.pooler_output.mean(0)), "must have a row per item"),
        (dict(trials=0), "trials must be a positive integer, got 0"),
        (dict(average_rank=1, min_rank=2), "min_rank"),
        (dict(average_rank=8, budget_parameters=100), "budget_parameters"),
        (dict(target_modules=["pooler.dense"]), "no influence|scores are all zero"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        predict(**arguments)
    assert "\n" not in str(caught.value)


def test_no_disagreement_anywhere():
    model = tiny("bert")
    model.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN|nan"):
        predict(model)
    with pytest.raises(ValueError, match="zero"):
        predict(output=lambda o: torch.zeros_like(o.last_hidden_state))


def test_weights_that_were_never_loaded(tmp_path):
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertModel

    BertModel(tiny("bert").config, add_pooling_layer=False).save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="checkpoint did not have: .*classifier.weight"):
        predict(classifier, output="logits")
    with pytest.raises(ValueError, match="checkpoint did not have: .*pooler.dense"):
        predict(BertModel.from_pretrained(tmp_path), output="pooler")
    base = predict(BertModel.from_pretrained(tmp_path))
    assert predict(classifier).scores == base.scores
    masked = AutoModelForMaskedLM.from_pretrained(tmp_path)
    plan = predict(masked)
    assert plan.settings["output"] == "mean_pooled_hidden_state" and plan.scores == base.scores
    assert all(p.requires_grad for p in classifier.parameters())
    torch.nn.init.constant_(classifier.classifier.bias, random.random())  # still writable
    asked = predict(classifier, output=lambda o: o.logits)
    assert asked.settings["output"] == "callable"


def test_a_sharded_or_unloaded_model_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    buffered = nn.Sequential(nn.Linear(4, 4))
    buffered[0].register_buffer("scale", torch.ones(4, device="meta"))
    for one, name in ((model, "0.weight"), (buffered, "0.scale")):
        with pytest.raises(ValueError, match=f"{name} is on the meta device"):
            predict(one, [{"input": torch.ones(2, 4)}], target_modules="all-linear")
