"""What the engine adds to the naive loop: stored outputs, the skipped head, rounds, processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.models.forward_patching import undisturbed
from adarank_fast.models.memory import Memory
from adarank_fast.models.outputs import choose_output
from adarank_fast.models.precision import copy_in_dtype
from adarank_fast.models.targets import find_targets
from adarank_fast.plan.uncertainty import pooled_variation
from adarank_fast.prediction import prober as probing
from adarank_fast.prediction.checkpoint import Checkpoint
from adarank_fast.prediction.linear_cache import _Same
from adarank_fast.prediction.noise import Variant, measure_stds
from adarank_fast.prediction.prober import Prober
from adarank_fast.prediction.recording import BY_CONTENT, FOLDED, record_clean_passes
from adarank_fast.prediction.replay import Replay
from bench.naive import naive_disagreements
from tests.tiny_models import batch, spread, tiny


def predict(model=None, batches=None, **kwargs):
    model = model or tiny("bert")
    batches = [batch("bert")] if batches is None else batches
    return ada.predict_ranks(model, batches, **{"progress": False, "trials": 2, **kwargs})


def assert_same(first, second, rel=1e-6):
    assert first.ranks == second.ranks
    for name, score in first.scores.items():
        assert second.scores[name].trials == pytest.approx(score.trials, rel=rel)


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


def test_a_variant_that_overflows_is_named():
    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

        def forward(self, x):
            x = self.layers[0](x)
            moved = (self.layers[1](x) - nn.functional.linear(x, *self.layers[1].parameters())) * 1
            return x / (moved.abs().amax() == 0)

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


# dtype=


def test_the_copy_in_another_dtype_shares_nothing_and_keeps_buffers():
    model = tiny("llama")
    other = copy_in_dtype(model, torch.bfloat16)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {b.dtype for n, b in other.named_buffers() if "inv_freq" in n} == {torch.float32}
    mine = {p.data_ptr() for p in model.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in other.parameters())


def test_probing_in_bfloat16():
    model, inputs = tiny("llama"), batch("llama")
    exact = predict(model, [inputs])
    coarse = predict(model, [inputs], dtype=torch.bfloat16)
    assert coarse.settings["dtype"] == "bfloat16" and exact.settings["dtype"] == "float32"
    for name, score in exact.scores.items():
        assert coarse.scores[name].mean == pytest.approx(score.mean, rel=0.1)
        assert abs(coarse.ranks[name] - exact.ranks[name]) <= 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# Adaptive trials and certainty


def test_adaptive_trials_go_where_ranks_are_large():
    fixed = predict(trials=12, average_rank=16)
    plan = predict(trials=ada.AdaptiveTrials(2, 12), average_rank=16)
    counts = {name: len(score.trials) for name, score in plan.scores.items()}
    for name, score in plan.scores.items():
        assert score.trials == pytest.approx(fixed.scores[name].trials[: counts[name]], rel=1e-5)
    cv = pooled_variation([score.trials for score in plan.scores.values()])
    assert min(counts.values()) < max(counts.values())
    total = sum(score.mean for score in plan.scores.values())
    for name, score in plan.scores.items():
        rank = 16 * len(counts) * score.mean / total
        half_width = 1.96 * rank * cv / math.sqrt(counts[name])
        assert half_width < 1.05 or counts[name] == 12  # the total moved with the last round
    assert plan.settings["trials"] == {"minimum": 2, "maximum": 12}


@pytest.mark.parametrize("bounds", [(1, 5), (4, 3), (2.5, 3)])
def test_adaptive_trials_reject(bounds):
    with pytest.raises(ValueError, match="AdaptiveTrials: m"):
        ada.AdaptiveTrials(*bounds)


def test_the_chance_of_another_rank_is_what_other_seeds_show():
    plans = [predict(seed=seed, trials=3, average_rank=8) for seed in range(12)]
    said = [sum(plan.chance_of_change().values()) / len(plan.ranks) for plan in plans]
    pairs = [(a, b) for i, a in enumerate(plans) for b in plans[:i]]
    seen = [sum(a.ranks[n] != b.ranks[n] for n in a.ranks) / len(a.ranks) for a, b in pairs]
    assert sum(said) / len(said) == pytest.approx(sum(seen) / len(seen), abs=0.1)
    assert predict(trials=1).chance_of_change() is None
    assert "may change" in plans[0].table() and "may change" not in predict(trials=1).table()


# max_seconds


def test_max_seconds(monkeypatch):
    with pytest.raises(TimeoutError, match=r"before 12 of 12 modules had a trial"):
        predict(max_seconds=1e-9)
    clock = iter([0.0] * 5 + [0.5] * 3 + [2.0] * 1000)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.warns(UserWarning, match=r"max_seconds=1: \d+ of 12 modules had fewer than 5"):
        plan = predict(max_seconds=1, trials=5)
    assert {len(score.trials) for score in plan.scores.values()} <= {1, 2, 3, 4}


# checkpoint=


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


# Processes


WORKER = """
import os, sys, torch, torch.distributed as dist
import adarank_fast as ada
from tests.tiny_models import batch, tiny
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=__import__("datetime").timedelta(seconds=60))
rank = dist.get_rank()
plan = ada.predict_ranks(tiny("bert"), [batch("bert")], trials=ada.AdaptiveTrials(2, 6),
                         average_rank=16, checkpoint=sys.argv[1] + "/c", progress=False)
plan.save(f"{sys.argv[1]}/{rank}.json")
for label, model, inputs in (
    ("batches", tiny("bert"), batch("bert", seed=rank)),
    ("nan", tiny("bert"), batch("bert")),
):
    try:
        output = (lambda o: o.last_hidden_state / (rank == 0)) if label == "nan" else "auto"
        if label == "nan" and rank == 0:
            output = lambda o: o.last_hidden_state
        ada.predict_ranks(model, [inputs], trials=1, output=output, progress=False)
    except ValueError as error:
        os.write(1, f"{label} {rank} {error}\\n".encode())  # whole lines: the pipe is shared
dist.destroy_process_group()
"""


def test_two_processes_give_the_plan_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    paths = os.pathsep.join([os.getcwd(), os.path.join(os.getcwd(), "kernels")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--standalone", str(tmp_path / "worker.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plans = [ada.RankPlan.load(tmp_path / f"{rank}.json") for rank in (0, 1)]
    alone = predict(trials=ada.AdaptiveTrials(2, 6), average_rank=16)
    assert_same(alone, plans[0])
    assert plans[0].scores == plans[1].scores
    lines = {line.split()[0] + line.split()[1] for line in done.stdout.splitlines() if line}
    assert {"batches0", "batches1", "nan0", "nan1"} <= lines
    probes = [len((tmp_path / name).read_text().splitlines()) - 1 for name in ("c", "c.1")]
    assert sum(probes) == sum(len(s.trials) for s in alone.scores.values())
    assert abs(probes[0] - probes[1]) <= 3


def test_a_sharded_or_unloaded_model_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="0.weight is on the meta device"):
        predict(model, [{"input": torch.ones(2, 4)}], target_modules="all-linear")


def test_the_plan_file_keeps_all_of_it(tmp_path):
    plan = predict(trials=ada.AdaptiveTrials(2, 4), dtype=torch.bfloat16)
    plan.save(tmp_path / "plan.json")
    assert ada.RankPlan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["settings"]["dtype"] == "bfloat16"
