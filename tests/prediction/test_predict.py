"""The prediction against the naive loop, and the model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.models.outputs import mean_pool
from adarank_fast.models.targets import find_targets
from adarank_fast.prediction.folding import FOLDED
from bench.naive import naive_disagreements
from tests.prediction.tiny_predictions import assert_same, predict
from tests.tiny_models import batch, rows, tiny


def pooled(outputs, inputs):
    return mean_pool(outputs.last_hidden_state, inputs.get("attention_mask"))


def logits(outputs, inputs):
    return outputs.logits


def hidden(outputs, inputs):
    return outputs.last_hidden_state


CASES = {  # model: (read of the naive loop, output, mask of the naive loop)
    "bert": (pooled, "auto", None),
    "llama": (logits, "auto", "attention_mask"),
    "gpt2": (logits, "auto", "attention_mask"),
    "t5": (logits, "auto", None),
    "deberta": (hidden, "last_hidden_state", "attention_mask"),
}


def assert_same_as_naive(plan, naive):
    for name, values in naive.items():
        torch.testing.assert_close(
            torch.tensor(plan.scores[name].trials), torch.tensor(values), rtol=1e-5, atol=1e-9
        )
    means = {name: sum(values) / len(values) for name, values in naive.items()}
    assert plan.ranks == ada.allocate_ranks(means, average_rank=8, sizes=plan.sizes)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("target_modules", ["attention", "all-linear"])
def test_same_numbers_as_the_naive_loop(kind, target_modules):
    model = tiny(kind)
    batches = [batch(kind), batch(kind, lengths=(6, 6), seed=1)]
    read, output, mask = CASES[kind]
    plan = ada.predict_ranks(
        model, batches, 8, target_modules=target_modules, output=output, trials=2, progress=False
    )
    modules = {t.name: t.path for t in find_targets(model, target_modules)}
    assert list(plan.ranks) == list(modules)
    assert_same_as_naive(
        plan, naive_disagreements(model, batches, modules, read, trials=2, mask=mask)
    )


def test_deberta_shares_projections_and_is_probed_one_by_one():
    plan = ada.predict_ranks(tiny("deberta"), [batch("deberta")], 8, trials=1, progress=False)
    route = {name.rsplit(".", 1)[-1]: r for name, r in plan.settings["routes"].items()}
    assert route["query_proj"] == "the batch is not the first dimension of its input"
    assert route["value_proj"] == FOLDED


def test_inside_inference_mode():
    with torch.inference_mode():
        inside = predict()
    assert inside.scores == predict().scores


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_plan_does_not_depend_on_batches_or_folds(kind, monkeypatch):
    model, full = tiny(kind), batch(kind, lengths=(9, 7, 9, 4))
    reference = ada.predict_ranks(model, [full], 8, trials=2, progress=False)
    ones = [rows(full, i, i + 1) for i in range(4)]
    assert_same(reference, ada.predict_ranks(model, ones, 8, trials=2, progress=False), rel=1e-5)
    wide = batch(kind, lengths=(9, 7, 9, 4), width=9)
    wide = {k: nn.functional.pad(v, (0, 3)) for k, v in wide.items()}
    assert_same(reference, ada.predict_ranks(model, [wide], 8, trials=2, progress=False), rel=1e-5)
    monkeypatch.setattr("adarank_fast.prediction.prober.FOLDED_TOKENS", {"cpu": 100})
    few = ada.predict_ranks(model, iter([full]), 8, trials=2, max_memory=50_000, progress=False)
    assert_same(reference, few, rel=1e-5)


def test_same_seed_same_bits_another_seed_other_noise():
    model, batches = tiny("bert"), [batch("bert")]
    first = ada.predict_ranks(model, batches, 8, trials=2, progress=False)
    again = ada.predict_ranks(model, batches, 8, trials=2, progress=False)
    assert first.scores == again.scores and first.ranks == again.ranks
    other = ada.predict_ranks(model, batches, 8, trials=2, seed=1, progress=False)
    assert first.scores != other.scores
    subset = ada.predict_ranks(
        model, batches, 8, target_modules=["value"], trials=2, progress=False
    )
    for name, score in subset.scores.items():
        assert score.trials == pytest.approx(first.scores[name].trials, rel=1e-5)


def test_the_task_model_gives_the_plan_of_its_base_model():
    from transformers import AutoModelForSequenceClassification

    model = tiny("bert")
    classifier = AutoModelForSequenceClassification.from_config(model.config).eval()
    classifier.bert.load_state_dict(model.state_dict())
    labelled = {**batch("bert"), "labels": torch.tensor([0, 1, 0, 1])}
    base = ada.predict_ranks(model, [batch("bert")], 8, trials=1, progress=False)
    task = ada.predict_ranks(classifier, [labelled], 8, trials=1, progress=False)
    assert base.scores == task.scores and base.ranks == task.ranks


@pytest.mark.parametrize("metric", ["l1", "tv", "kl", "js", "argmax"])
def test_metrics_against_torch(metric):
    model, inputs = tiny("llama"), batch("llama")
    targets = find_targets(model, ["q_proj"])
    plan = ada.predict_ranks(
        model, [inputs], 8, target_modules=["q_proj"], trials=1, metric=metric, progress=False
    )
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        clean = model(**inputs).logits[keep].double()
        for target in targets:
            changed = copy.deepcopy(model)
            noise, _ = ada.perturbation(target.module, target.name, 0)
            changed.get_submodule(target.path).weight += noise
            moved = changed(**inputs).logits[keep].double()
            expected = slow_metric(metric, moved, clean)
            assert plan.scores[target.name].mean == pytest.approx(expected, rel=2e-5, abs=1e-9)


def slow_metric(metric, f, g):
    p, q = torch.distributions.Categorical(logits=f), torch.distributions.Categorical(logits=g)
    divergence = torch.distributions.kl_divergence
    mixture = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
    values = {
        "l1": (f - g).abs().mean(-1),
        "tv": (p.probs - q.probs).abs().sum(-1) / 2,
        "kl": divergence(p, q),
        "js": (divergence(p, mixture) + divergence(q, mixture)) / 2,
        "argmax": (f.argmax(-1) != g.argmax(-1)).double(),
    }
    return values[metric].mean().item()


def state(model):
    return (
        {name: (p.clone(), p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()},
        {name: (m.training, set(m.__dict__)) for name, m in model.named_modules()},
        {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        torch.backends.mha.get_fastpath_enabled(),
    )


def assert_state(before, after):
    for name, (value, flag, pointer) in before[0].items():
        assert torch.equal(value, after[0][name][0]) and after[0][name][1:] == (flag, pointer)
    assert before[1:] == after[1:]


class Interrupting:
    """An output that gives up at its n-th reading."""

    def __init__(self, after, error):
        self.left, self.error = after, error

    def __call__(self, outputs):
        self.left -= 1
        if self.left <= 0:
            raise self.error
        return outputs.last_hidden_state[:, 0]


@pytest.mark.parametrize("kind", ["bert", "deberta"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
@pytest.mark.parametrize("after", [1, 2, 4, 6])
def test_the_model_comes_back_as_it_was(kind, error, after):
    model = tiny(kind).train()
    model.encoder.layer[0].eval()
    model.embeddings.requires_grad_(False)
    random_state = torch.get_rng_state()
    before = state(model)
    refused = (RuntimeError, ada.AdarankError) if isinstance(error, Exception) else error
    with pytest.raises(refused):
        ada.predict_ranks(
            model, [batch(kind)], 8, output=Interrupting(after, error), progress=False
        )
    assert_state(before, state(model))
    ada.predict_ranks(model, [batch(kind)], 8, trials=1, progress=False)
    assert_state(before, state(model))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model(**batch(kind)).last_hidden_state.requires_grad


def test_a_peft_model_is_probed_beneath_its_adapters():
    from peft import LoraConfig, get_peft_model

    plain = ada.predict_ranks(tiny("bert"), [batch("bert")], 8, trials=1, progress=False)
    peft_model = get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"]))
    plan = ada.predict_ranks(peft_model, [batch("bert")], 8, trials=1, progress=False)
    assert plan.ranks == plain.ranks and plan.scores == plain.scores


def test_bfloat16_keeps_the_noise():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(64, 64)), torch.randn(32, 64)
    exact = predict(model, [{"input": inputs}], target_modules="all-linear", trials=3)
    model, inputs = model.bfloat16(), inputs.bfloat16()
    coarse = predict(model, [{"input": inputs}], target_modules="all-linear", trials=3)
    assert coarse.scores["0"].mean == pytest.approx(exact.scores["0"].mean, rel=0.005)
