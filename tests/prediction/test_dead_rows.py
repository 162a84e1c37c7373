import pytest
import torch
from torch import nn

import adarank_fast as ada
from adarank_fast.models.forward_patching import undisturbed
from adarank_fast.models.outputs import choose_output
from adarank_fast.models.targets import find_targets
from adarank_fast.prediction.recording import record_clean_passes
from bench.naive import naive_disagreements
from tests.tiny_models import batch, tiny


def first_token(outputs):
    return outputs.last_hidden_state[:, 0]


def pooler(outputs):
    return outputs.pooler_output


def last_token(outputs):
    return outputs.logits[:, -1]


def passes_of(kind, output, lengths=(9, 9, 9), targets="all-linear"):
    model, inputs = tiny(kind), batch(kind, lengths=lengths)
    with undisturbed(model):
        chosen = choose_output(model, output, inputs)
        found = find_targets(model, targets)
        return record_clean_passes(model, chosen, [inputs], found)


def read_rows(clean):
    names = {module: name for name, module in clean.reader.root.named_modules()}
    return {
        names[module].rpartition(".")[2]: rows.index.tolist()
        for module, rows in clean.needed_rows[0].items()
    }


def test_a_pooler_reads_the_first_token():
    first = [0, 9, 18]
    rows = read_rows(passes_of("bert", "pooler"))
    assert rows == {"query": first, "dense": first}  # both dense layers; key and value are read
    assert len(passes_of("bert", "pooler").needed_rows[0]) == 4


def test_a_callable_may_read_the_last_token():
    last = [8, 17, 26]
    rows = read_rows(passes_of("llama", last_token))
    assert rows == dict.fromkeys(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), last)


@pytest.mark.parametrize("output", ["auto", "last_hidden_state"])
def test_other_outputs_read_everything(output):
    assert read_rows(passes_of("bert", output)) == {}


def test_masked_keys_are_computed_all_the_same():
    """Their weight in attention is zero, and NaN times zero is NaN."""
    model, inputs = tiny("llama"), batch("llama", lengths=(9, 2))
    inputs = {key: value.flip(1) for key, value in inputs.items()}  # padded on the left
    with undisturbed(model):
        chosen = choose_output(model, last_token, inputs)
        targets = find_targets(model, "all-linear")
        clean = record_clean_passes(model, chosen, [inputs], targets)
    assert set(read_rows(clean)) == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("kind", "output", "read"),
    [
        ("bert", "pooler", lambda outputs, _: outputs.pooler_output),
        ("bert", first_token, lambda outputs, _: first_token(outputs)),
        ("llama", last_token, lambda outputs, _: last_token(outputs)),
    ],
)
def test_disagreements_are_those_of_the_naive_loop(kind, output, read):
    model, inputs = tiny(kind).double(), batch(kind, lengths=(9, 9, 9))
    plan = ada.predict_ranks(
        model, [inputs], 8, output=output, target_modules="all-linear", trials=2, progress=False
    )
    modules = {t.name: t.path for t in find_targets(model, "all-linear")}
    naive = naive_disagreements(model, [inputs], modules, read, 2)
    for name, values in naive.items():
        assert plan.scores[name].trials == pytest.approx(values, rel=1e-7)


class Choosing(nn.Module):
    """Reads one position of its last block in the clean pass, and all when that one is large."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x[:, :1].mean(1) if x[:, 1:].sum() == 0 else x.mean(1)


def test_what_depends_on_values_without_a_gradient_is_found_out():
    """A comparison has no gradient; NaN changes its outcome."""
    model = Choosing()
    with torch.no_grad():
        model.layers[1].weight.zero_()
        model.layers[1].bias.zero_()
    with undisturbed(model):
        inputs = {"x": torch.randn(3, 9, 6)}
        chosen = choose_output(model, "auto", inputs)
        targets = find_targets(model, "all-linear")
        clean = record_clean_passes(model, chosen, [inputs], targets)
    assert read_rows(clean) == {}


def test_a_block_without_gradients_is_computed_whole():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    model = Choosing()
    model.layers[1] = Detached(6, 6)
    with undisturbed(model):
        inputs = {"x": torch.randn(3, 9, 6)}
        chosen = choose_output(model, "auto", inputs)
        clean = record_clean_passes(model, chosen, [inputs], find_targets(model, ["layers.0"]))
    assert read_rows(clean) == {}


class Gated(nn.Module):
    """Pools the positions that a hard gate lets pass; `gate` says where it looks."""

    def __init__(self, gate):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.gate = gate

    def forward(self, x):
        before = self.layers[0](x)
        after = self.layers[1](before)
        chosen = self.gate({"before": before, "after": after, "x": x})[..., None]
        return torch.where(chosen, after, 0).sum(1)


GATES = {
    "compares": lambda seen: seen["after"][..., 0] > 0.5,
    "compares what is cut off": lambda seen: seen["after"].detach()[..., 0] > 0.5,
    "compares an earlier layer": lambda seen: seen["before"][..., 0] > 0.3,
    "takes the largest": lambda seen: nn.functional.one_hot(
        seen["after"][..., 0].argmax(1), seen["x"].shape[1]
    ).bool(),
    "rounds": lambda seen: seen["after"][..., 0].long() == 0,
    "turns NaN into 0": lambda seen: (
        seen["after"][..., 0].nan_to_num().sign().bool() & (seen["x"][..., 0] > 0)
    ),
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_positions_that_a_hard_gate_leaves_out_are_computed(gate):
    model, inputs = Gated(gate), {"x": torch.randn(5, 9, 6)}
    plan = ada.predict_ranks(
        model, [inputs], 2, target_modules="all-linear", trials=4, progress=False
    )
    modules = {name: name for name in plan.ranks}
    naive = naive_disagreements(model, [inputs], modules, lambda outputs, _: outputs, 4)
    for name, values in naive.items():
        assert plan.scores[name].trials == pytest.approx(values, rel=1e-4)


def test_positions_that_a_fixed_gate_leaves_out_are_not():
    model, inputs = Gated(lambda seen: seen["x"][..., 0] > 0), {"x": torch.randn(5, 9, 6)}
    with undisturbed(model):
        chosen = choose_output(model, "auto", inputs)
        clean = record_clean_passes(model, chosen, [inputs], find_targets(model, "all-linear"))
    assert read_rows(clean)["1"] == (inputs["x"][..., 0] > 0).flatten().nonzero()[:, 0].tolist()
