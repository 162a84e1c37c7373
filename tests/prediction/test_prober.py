"""What the engine adds to the naive loop: stored outputs, the skipped head, routes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adarank_fast.models.forward_patching import undisturbed
from adarank_fast.models.memory import Memory
from adarank_fast.models.outputs import choose_output
from adarank_fast.models.targets import find_targets
from adarank_fast.prediction import prober as probing
from adarank_fast.prediction.folding import BY_CONTENT, FOLDED
from adarank_fast.prediction.linear_cache import _Same
from adarank_fast.prediction.noise import Variant, measure_stds
from adarank_fast.prediction.prober import Prober
from adarank_fast.prediction.recording import record_clean_passes
from adarank_fast.prediction.replay import Replay
from bench.naive import naive_disagreements
from tests.prediction.tiny_predictions import assert_same, predict
from tests.tiny_models import batch, spread, tiny


def opened(kind, targets, position):
    model, inputs = tiny(kind), batch(kind, lengths=(9, 9))
    targets = find_targets(model, targets)
    clean = record_clean_passes(model, choose_output(model, "auto", inputs), [inputs], targets)
    replay = Replay(clean)
    replay.advance(position)
    return model, targets, replay


def test_products_that_no_perturbation_reached_are_not_computed_again(monkeypatch):
    rows = []
    linear = nn.functional.linear

    def counting(x, weight, bias=None):
        rows.append((x.shape[0], weight.shape[0]))
        return linear(x, weight, bias)

    model = tiny("bert")
    with undisturbed(model):
        model, targets, replay = opened("bert", "attention", 2)
        block = [t for t in targets if t.block == "encoder.layer.2"]
        prober = Prober(model, replay, 0, "l1", measure_stds(targets), Memory(2**30))
        monkeypatch.setattr(nn.functional, "linear", counting)
        list(prober.run([Variant(target, 0) for target in block]))
    # variants: query, key, value, output; two items each; after attention all four differ
    pooler = (8, 32)
    assert rows == [(6, 32), (8, 48), (8, 32), pooler]


def test_embeddings_are_computed_once():
    with undisturbed(model := tiny("bert")):
        inputs = batch("bert", lengths=(9, 7))
        targets = find_targets(model, "attention")
        chosen = choose_output(model, "auto", inputs)
        replay = Replay(record_clean_passes(model, chosen, [inputs], targets))
        calls = []
        words = model.embeddings.word_embeddings
        words.register_forward_pre_hook(lambda *_: calls.append(1))
        for position in (0, 2):
            replay.advance(position)
            calls.clear()
            folded = replay.run(0, 3, {})
            assert not calls
            for variant in folded:
                torch.testing.assert_close(variant, replay.clean.outputs[0], rtol=1e-5, atol=1e-6)


class Quantised(nn.Module):
    """Embeddings of what a first linear layer makes of the input: perturbing it changes them."""

    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(8, 6), nn.LayerNorm(6)

        def forward(self, codes):
            return self.norm(self.table(codes))

    def __init__(self):
        super().__init__()
        self.first, self.codes = nn.Linear(6, 8), self.Codes()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def forward(self, x):
        h = self.codes(self.first(x).argmax(-1))
        for layer in self.layers:
            h = h + layer(h).tanh()
        return h.mean(1)


def test_embeddings_that_a_perturbation_reaches_are_computed():
    torch.manual_seed(0)
    model, inputs = Quantised().eval(), {"x": torch.randn(4, 5, 6)}
    modules = {"first": "first", "layers.0": "layers.0", "layers.1": "layers.1"}
    options = dict(target_modules=list(modules), average_rank=2, trials=3)
    plan = predict(model, [inputs], **options, output=lambda outputs: outputs)
    naive = naive_disagreements(model, [inputs], modules, lambda o, i: o, 3)
    for name, values in naive.items():
        assert plan.scores[name].trials == pytest.approx(values, rel=1e-5) and max(values) > 0


@pytest.mark.parametrize(
    "clean",
    [
        torch.arange(24.0).view(2, 3, 4),
        torch.arange(15.0).view(1, 3, 5).bfloat16(),  # 30 bytes
        torch.arange(25.0)[1:].view(2, 3, 4),  # starts between eight bytes
        torch.arange(24.0).view(2, 4, 3).transpose(1, 2),
    ],
    ids=["eight bytes at a time", "odd size", "odd start", "other strides"],
)
def test_inputs_are_compared_whatever_their_layout(clean):
    changed = clean.clone()
    changed[-1, -1, -1] += 1
    for variants in (torch.stack([clean, changed, clean]), torch.stack([changed, clean, clean])):
        found = _Same()(variants.flatten(0, 1), variants, clean)
        assert found == [torch.equal(variant, clean) for variant in variants]


def test_the_head_is_skipped_only_where_it_makes_the_output():
    with undisturbed(model := tiny("llama")):
        _, _, replay = opened("llama", "attention", 0)
        clean = replay.clean
        assert clean.reader.head is not None and clean.outputs[0].shape == (2, 9, 32)
    capped = tiny("llama")
    forward = capped.forward

    def soft_capped(**inputs):
        outputs = forward(**inputs)
        outputs.logits = 5 * torch.tanh(outputs.logits / 5)
        return outputs

    capped.forward = soft_capped
    inputs = batch("llama")
    plan = predict(capped, [inputs], target_modules=["q_proj"])
    modules = {t.name: t.path for t in find_targets(model, ["q_proj"])}
    naive = naive_disagreements(
        capped, [inputs], modules, lambda o, i: o.logits, 2, mask="attention_mask"
    )
    for name, values in naive.items():
        assert plan.scores[name].trials == pytest.approx(values, rel=1e-5)


def test_the_head_itself_can_be_a_target():
    inputs = batch("llama")
    plan = predict(tiny("llama"), [inputs], target_modules=["lm_head", "q_proj"])
    naive = naive_disagreements(
        tiny("llama"), [inputs], {"lm_head": "lm_head"}, lambda o, i: o.logits, 2,
        mask="attention_mask",
    )  # fmt: skip
    assert plan.scores["lm_head"].trials == pytest.approx(naive["lm_head"], rel=1e-5)


def test_hidden_states_that_wait_for_each_other_give_the_same_values(monkeypatch):
    monkeypatch.setitem(probing.FOLDED_TOKENS, "cpu", 40)  # a few variants a run
    calls, compare = [], probing.disagreement_sums

    def counted(outputs, *rest):
        calls.append(len(outputs))
        return compare(outputs, *rest)

    monkeypatch.setattr(probing, "disagreement_sums", counted)
    plans, counts = [], []
    for most in (1, 5, 15):
        monkeypatch.setattr(probing, "COMPARED", most)
        calls.clear()
        plans.append(predict(tiny("llama"), [batch("llama")], trials=3, metric="tv"))
        counts.append(len(calls))
        assert max(calls) <= max(most, 2) and sum(calls) == 3 * len(plans[0].ranks)
    assert counts[0] > counts[1] > counts[2]
    assert_same(plans[0], plans[1], rel=1e-5)
    assert_same(plans[0], plans[2], rel=1e-5)


class Experts(nn.Module):
    """Two experts, each for the tokens whose first feature has its sign."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict(self.block()) for _ in range(2)])

    @staticmethod
    def block():
        return {"mix": nn.Linear(6, 6), "plus": nn.Linear(6, 6), "minus": nn.Linear(6, 6)}

    def forward(self, x):
        for layer in self.layers:
            x = layer["mix"](x).tanh()
            flat, y = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
            for name, chosen in (("plus", flat[:, 0] > 0), ("minus", flat[:, 0] <= 0)):
                y[chosen] = layer[name](flat[chosen])
            x = x + y.view_as(x)
        return x.mean(1)


def test_experts_are_probed_one_by_one():
    torch.manual_seed(0)
    model = spread(Experts())
    batches = [{"x": torch.randn(5, 7, 6)}, {"x": torch.randn(3, 4, 6)}]
    plan = predict(model, batches, target_modules="all-linear", average_rank=2)
    routes = plan.settings["routes"]
    assert {r for n, r in routes.items() if "mix" not in n} == {BY_CONTENT}
    assert {r for n, r in routes.items() if "mix" in n} == {FOLDED}
    modules = {t.name: t.path for t in find_targets(model, "all-linear")}
    naive = naive_disagreements(model, batches, modules, lambda out, inputs: out, trials=2)
    for name, values in naive.items():
        assert plan.scores[name].trials == pytest.approx(values, rel=1e-5)


def test_rows_that_a_perturbation_changes_are_seen_late_and_probed_one_by_one():
    class Late(nn.Module):
        """Rows of the second layer depend on what the first one gives, in no clean pass."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                [nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})]
            )

        def forward(self, x):
            a = self.layers[0]["a"](x)
            far = a.flatten(1).abs().amax(1) > 2.0
            y = a.clone()
            y[~far] = self.layers[0]["b"](a[~far])
            return y.mean(1)

    torch.manual_seed(0)
    model = Late()
    with torch.no_grad():
        model.layers[0]["a"].weight.mul_(4)
    inputs = {"x": torch.randn(6, 3, 6)}
    inputs["x"] *= 1.9 / model.layers[0]["a"](inputs["x"]).abs().max()
    plan = predict(model, [inputs], target_modules="all-linear", average_rank=2, trials=5)
    modules = {t.name: t.path for t in find_targets(model, "all-linear")}
    naive = naive_disagreements(model, [inputs], modules, lambda out, _: out, trials=5)
    for name, values in naive.items():
        assert plan.scores[name].trials == pytest.approx(values, rel=1e-5)
    assert plan.settings["routes"]["layers.0.b"] == BY_CONTENT


def test_random_forward_is_refused():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return nn.functional.dropout(self.linear(x), 0.5, training=True)

    with pytest.raises(ValueError, match="another output when it is run again in eval mode"):
        predict(Random(), [{"x": torch.randn(3, 6)}], target_modules="all-linear", average_rank=2)


def test_a_forward_that_takes_turns_is_refused():
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(6, 6), 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x) + self.calls % 2

    with pytest.raises(ValueError, match="another output when it is run again in eval mode"):
        predict(Turns(), [{"x": torch.randn(3, 6)}], target_modules="all-linear", average_rank=2)


def test_a_variant_that_overflows_is_named():
    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

        def forward(self, x):
            x = self.layers[0](x)
            moved = (self.layers[1](x) - nn.functional.linear(x, *self.layers[1].parameters())) * 1
            return x / (moved.abs().amax(1, keepdim=True) == 0)

    with pytest.raises(ValueError, match=r"perturbed \(trial 0\)"):
        predict(
            Exploding(), [{"x": torch.randn(3, 6)}], target_modules="all-linear", average_rank=2
        )


def test_a_module_that_never_runs_is_named():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6)])
            self.idle = nn.Linear(6, 6)

        def forward(self, x):
            return self.layers[0](x)

    with pytest.raises(ValueError, match="target_modules: idle has no effect"):
        predict(Idle(), [{"x": torch.randn(3, 6)}], target_modules="all-linear", average_rank=2)


def test_an_expert_that_gets_no_tokens_scores_nothing():
    """One of several alternatives, so that it is no mistake to name it."""

    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict() for _ in range(2)])
            for layer in self.layers:
                layer["experts"] = nn.ModuleList(
                    [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
                )

        def forward(self, x):
            for layer in self.layers:
                flat = x.flatten(0, 1)
                choice = (flat[:, 0] > 0).long()  # never the third
                y = torch.zeros_like(flat)
                for expert in choice.unique().tolist():
                    y[choice == expert] = layer["experts"][expert](flat[choice == expert])
                x = x + y.view_as(x)
            return x.mean(1)

    torch.manual_seed(0)
    model = spread(Chosen())
    inputs = {"x": torch.randn(5, 7, 6)}
    with pytest.warns(UserWarning, match=r"2 of 6 modules got no input .*experts\.2\.0, \.\.\."):
        plan = predict(model, [inputs], target_modules="all-linear", average_rank=2)
    modules = {t.name: t.path for t in find_targets(model, "all-linear")}
    naive = naive_disagreements(model, [inputs], modules, lambda out, _: out, trials=2)
    for name, values in naive.items():
        assert plan.scores[name].trials == pytest.approx(values, rel=1e-5)
        assert (plan.ranks[name] == 0) == ("experts.2" in name)
