"""The prediction against the naive loop, and the model left as it was."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.models.batches import fold
from adarank_fast.models.forward_patching import undisturbed
from adarank_fast.models.memory import Memory
from adarank_fast.models.outputs import choose_output, mean_pool
from adarank_fast.models.targets import find_targets
from adarank_fast.prediction.noise import Variant, measure_stds
from adarank_fast.prediction.prober import Prober
from adarank_fast.prediction.recording import FOLDED, record_clean_passes
from adarank_fast.prediction.replay import Replay
from bench.naive import naive_disagreements
from tests.tiny_models import batch, rows, spread, tiny


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


def agree(plan, naive):
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
    agree(plan, naive_disagreements(model, batches, modules, read, trials=2, mask=mask))


def test_deberta_shares_projections_and_is_probed_one_by_one():
    plan = ada.predict_ranks(tiny("deberta"), [batch("deberta")], 8, trials=1, progress=False)
    route = {name.rsplit(".", 1)[-1]: r for name, r in plan.settings["routes"].items()}
    assert route["query_proj"] == "the batch is not the first dimension of its input"
    assert route["value_proj"] == FOLDED


class Albert(nn.Module):
    """One block called three times."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x):
        for _ in range(3):
            x = x + self.layers[0](x).tanh()
        return x.mean(1)


class Unet(nn.Module):
    """Later blocks read what earlier ones gave, not only the one before."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)])

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x * 2)
        return (x + outputs[0] + outputs[1]).mean(1)


class SequenceFirst(nn.Module):
    """Works on [T, B, D] inside."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x):
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x).tanh()
        return x.mean(0)


class Writer(nn.Module):
    """Changes a block's output in place between blocks."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x += 1
            x.tanh_()
        return x.mean(1)


class Direct(nn.Module):
    """Reads a linear's weight without calling it, as Mamba does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def forward(self, x):
        x = self.layers[0](x).tanh()
        return torch.nn.functional.linear(x, self.layers[1].weight, self.layers[1].bias).mean(1)


class BatchMean(nn.Module):
    """Items of a batch depend on each other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def forward(self, x):
        x = self.layers[0](x)
        return self.layers[1](x + x.sum(0, keepdim=True)).mean(1)


@pytest.mark.parametrize("kind", [Albert, Unet, SequenceFirst, Writer, Direct, BatchMean])
def test_unusual_modules(kind):
    torch.manual_seed(0)
    model = spread(kind())
    batches = [{"x": torch.randn(3, 5, 6)}, {"x": torch.randn(2, 4, 6)}]
    plan = ada.predict_ranks(model, batches, 2, target_modules="all-linear", progress=False)
    modules = {t.name: t.path for t in find_targets(model, "all-linear")}
    naive = naive_disagreements(model, batches, modules, lambda out, inputs: out, trials=5)
    for name, values in naive.items():
        torch.testing.assert_close(
            torch.tensor(plan.scores[name].trials), torch.tensor(values), rtol=1e-5, atol=1e-9
        )


def test_argmax_does_not_hide_what_is_missing():
    torch.manual_seed(0)
    model, inputs = spread(Unet()), {"x": torch.randn(30, 5, 6)}
    plan = ada.predict_ranks(
        model, [inputs], 2, target_modules="all-linear", metric="argmax", progress=False
    )
    asked = ada.predict_ranks(
        model, [inputs], 2, target_modules="all-linear", output=lambda o: o.argmax(-1).float()
    )
    target = find_targets(model, "all-linear")[-1]
    with torch.no_grad():
        clean = model(**inputs).argmax(-1)
        target.module.weight += ada.perturbation(target.module, target.name, 0)[0]
        target.module.bias += ada.perturbation(target.module, target.name, 0)[1]
        moved = model(**inputs).argmax(-1)
    assert plan.scores[target.name].trials[0] == (moved != clean).double().mean()
    assert asked.scores[target.name].trials[0] == (moved - clean).abs().double().mean()


def test_inside_inference_mode():
    with torch.inference_mode():
        inside = predict()
    assert inside.scores == predict().scores


def test_torch_transformer_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = spread(nn.TransformerEncoder(layer, 2))
    batches = [{"src": torch.randn(3, 5, 16)}]
    plan = ada.predict_ranks(model, batches, 2, target_modules="all-linear", progress=False)
    modules = {t.name: t.path for t in find_targets(model, "all-linear")}
    assert not any("out_proj" in name for name in modules)  # read there, never called
    naive = naive_disagreements(model, batches, modules, lambda out, inputs: out, trials=5)
    for name, values in naive.items():
        assert plan.scores[name].trials == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_plan_does_not_depend_on_batches_or_folds(kind, monkeypatch):
    model, full = tiny(kind), batch(kind, lengths=(9, 7, 9, 4))
    reference = ada.predict_ranks(model, [full], 8, trials=2, progress=False)
    ones = [rows(full, i, i + 1) for i in range(4)]
    assert_same(reference, ada.predict_ranks(model, ones, 8, trials=2, progress=False))
    wide = batch(kind, lengths=(9, 7, 9, 4), width=9)
    wide = {k: nn.functional.pad(v, (0, 3)) for k, v in wide.items()}
    assert_same(reference, ada.predict_ranks(model, [wide], 8, trials=2, progress=False))
    monkeypatch.setattr("adarank_fast.prediction.prober.FOLDED_TOKENS", {"cpu": 100})
    few = ada.predict_ranks(model, iter([full]), 8, trials=2, max_memory=50_000, progress=False)
    assert_same(reference, few)


def assert_same(first, second):
    assert first.ranks == second.ranks
    for name, score in first.scores.items():
        assert second.scores[name].trials == pytest.approx(score.trials, rel=1e-5)


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
        if not self.left:
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
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
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


# What a user may get wrong: one line that names the argument, the value and the remedy.


def predict(model=None, batches=None, **kwargs):
    model = model or tiny("bert")
    batches = [batch("bert")] if batches is None else batches
    return ada.predict_ranks(model, batches, **{"progress": False, "trials": 1, **kwargs})


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
        (dict(trials=0), "trials must be a positive integer .*, got 0"),
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


def test_routes_do_not_depend_on_chance():
    """A sequence length equal to the batch size must not look like a batch dimension."""
    model = SequenceFirst()
    plan = ada.predict_ranks(
        model, [{"x": torch.randn(4, 4, 6)}], 2, target_modules="all-linear", progress=False
    )
    assert FOLDED not in plan.settings["routes"].values()


def test_a_replay_keeps_all_outputs_once_an_earlier_one_is_read():
    """The NaN in place of those that were dropped bring the real ones back."""
    model = spread(Unet())
    batches = [{"x": torch.randn(3, 5, 6)}]
    targets = find_targets(model, "all-linear")
    with undisturbed(model):
        chosen = choose_output(model, "auto", batches[0])
        clean = record_clean_passes(model, chosen, batches, targets)
        replay = Replay(clean)
        replay.advance(3)
        batch_twice, patches = fold(batches[0], 2), replay._patches(0, 2, {}, False)
        assert clean.reader.read(batch_twice, patches).isnan().all()
        assert not replay._keep_all
        torch.testing.assert_close(replay.run(0, 2, {})[1], clean.outputs[0])
        assert replay._keep_all
        patches = replay._patches(0, 2, {}, False)
        assert not clean.reader.read(batch_twice, patches).isnan().any()
        prober = Prober(model, replay, 0, "l1", measure_stds(targets), Memory(2**30))
        assert [len(chunk) for chunk in prober.run([Variant(targets[-1], 0)])] == [1]


def test_estimate_cost():
    model, batches = tiny("bert"), [batch("bert"), batch("bert", seed=1)]
    cost = ada.estimate_cost(model, batches, "attention", trials=3)
    assert (cost.modules, cost.probes, cost.blocks) == (12, 12 * 3 * 2, 3)
    assert 0.4 * cost.naive_flops < cost.flops < 0.9 * cost.naive_flops
    assert cost.seconds > 0 and cost.memory_bytes > 0
    assert set(cost.routes.values()) == {FOLDED}
