"""Modules that a replay could get wrong, against the naive loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.models.batches import fold
from adarank_fast.models.forward_patching import undisturbed
from adarank_fast.models.memory import Memory
from adarank_fast.models.outputs import choose_output
from adarank_fast.models.targets import find_targets
from adarank_fast.prediction.folding import FOLDED
from adarank_fast.prediction.noise import Variant, measure_stds
from adarank_fast.prediction.prober import Prober
from adarank_fast.prediction.recording import record_clean_passes
from adarank_fast.prediction.replay import Replay
from bench.naive import naive_disagreements
from tests.tiny_models import spread


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


class Looks(nn.Module):
    """Decides at its end on what the first block returned."""

    def __init__(self, look):
        super().__init__()
        torch.manual_seed(0)
        blocks = (nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.layers = nn.ModuleList(blocks)
        self.look = look

    def forward(self, x):
        first = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x)
        return self.look(first, x)


@pytest.mark.parametrize(
    "look",
    [
        lambda first, x: torch.where(first > 0, x, 0.0),
        lambda first, x: x + first.nan_to_num(),
        lambda first, x: x if first.sum() < 1e9 else x * 0,
        lambda first, x: x.gather(-1, first.argsort(-1)) * x[..., :1],
    ],
    ids=["compares", "passes over NaN", "branches", "sorts"],
)
def test_decisions_on_what_an_earlier_block_returned(look):
    model, inputs = Looks(look), {"x": torch.randn(5, 7, 6)}
    options = dict(target_modules="all-linear", trials=2, progress=False)
    plan = ada.predict_ranks(model, [inputs], 2, **options)
    modules = {name: name for name in plan.ranks}
    naive = naive_disagreements(model, [inputs], modules, lambda outputs, _: outputs, 2)
    for name, values in naive.items():
        assert plan.scores[name].trials == pytest.approx(values, rel=1e-4)
