"""The demo's parts on a tiny encoder and made-up texts."""

from __future__ import annotations

import json
import re
import statistics

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adarank_fast import demo, report, training
from adarank_fast.plan import RankPlan
from adarank_fast.targets import find_targets
from tests.models import VOCABULARY, tiny

WORDS = [f"word{i}" for i in range(VOCABULARY - 2)]
EXAMPLES = [
    (" ".join(WORDS[(7 * i + j * (1 + i % 2)) % len(WORDS)] for j in range(3 + i % 5)), "ab"[i % 2])
    for i in range(60)
]


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


def run(folder, **changes):
    options = dict(names=("tiny", "words"), average_rank=2, epochs=2, seeds=2, quiet=True)
    encoder = tiny("bert")
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    results = demo.compare_on(
        encoder, tokenizer(), EXAMPLES[:40], EXAMPLES[40:], folder, **options | changes
    )
    assert {name: p for name, p in encoder.named_parameters()}.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, run(folder)


def test_both_arms_have_the_same_parameters(finished):
    _, results = finished
    adarank, uniform = (results["arms"][arm]["parameters"] for arm in demo.ARMS)
    assert uniform == RankPlan.uniform(tiny("bert"), 2).parameters
    assert abs(adarank - uniform) / uniform < 0.005
    assert {run["parameters"] for run in results["runs"]} == {adarank, uniform}


def test_report_files(finished):
    folder, results = finished
    names = {"report.md", "disagreement.png", "ranks.png", "training.png"}
    assert {path.name for path in folder.iterdir()} == names | {"plan.json", "results.json"}
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    text = (folder / "report.md").read_text()
    for name in ("disagreement.png", "ranks.png", "training.png"):
        assert f"]({name})" in text
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    plan = RankPlan.load(folder / "plan.json")
    assert plan.parameters == results["arms"]["adarank"]["parameters"]
    assert len(set(plan.ranks.values())) > 1


def test_same_seed_same_results(finished, tmp_path):
    _, results = finished
    again = run(tmp_path, seeds=1)
    for one, other in zip(results["runs"][:2], again["runs"], strict=True):
        for key in ("arm", "seed", "correct", "losses"):
            assert one[key] == other[key]
    assert len({str(one["losses"]) for one in results["runs"]}) == 4


def test_both_arms_start_alike_and_see_the_items_in_the_same_order(monkeypatch):
    seen: list[list] = []

    def collate(items, pad, original=training.collate):
        seen[-1].append([tuple(item["input_ids"]) for item in items])
        return original(items, pad)

    monkeypatch.setattr(training, "collate", collate)
    encoder = tiny("bert")
    items = training.encode(tokenizer(), EXAMPLES[:40], ["a", "b"])
    targets = find_targets(encoder)
    sizes = {t.name: (t.in_features, t.out_features) for t in targets}
    mixed = RankPlan({t.name: i % 4 for i, t in enumerate(targets)}, sizes)
    heads = []
    for plan in (mixed, RankPlan.uniform(encoder, 2)):
        seen.append([])
        model, losses, seconds = training.train_arm(
            encoder, plan, items, 2, 0, epochs=2, batch_size=8, learning_rate=0.0
        )
        assert len(seconds) == len(seen[-1]) == 10
        heads.append(model.base_model.model.head.modules_to_save["default"].weight)
    assert seen[0] == seen[1]
    assert torch.equal(*heads)


def test_training_learns(finished):
    encoder = tiny("bert")
    items = training.encode(tokenizer(), EXAMPLES[:40], ["a", "b"])
    plan = RankPlan.uniform(encoder, 4)
    model, losses, _ = training.train_arm(
        encoder, plan, items, 2, 0, epochs=12, batch_size=8, learning_rate=1e-2
    )
    assert losses[-1][1] < 0.5 * losses[0][1]
    assert statistics.fmean(training.evaluate(model, items, 0)) > 0.9


def test_classifier_pools_over_unmasked_positions():
    model = training.MeanPoolClassifier(tiny("bert"), 3).eval()
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask = (ids > 0).long()
    both = model(ids, mask)["logits"]
    alone = model(ids[:1, :3], mask[:1, :3])["logits"]
    torch.testing.assert_close(both[:1], alone)
    assert {t.name for t in find_targets(model)} == {t.name for t in find_targets(model.encoder)}


def test_evaluate_keeps_the_order():
    model = training.MeanPoolClassifier(tiny("bert"), 2).eval()
    items = training.encode(tokenizer(), EXAMPLES, ["a", "b"])
    one_by_one = [training.evaluate(model, [item], 0)[0] for item in items]
    assert training.evaluate(model, items, 0, batch_size=7) == one_by_one
    assert 0 < sum(one_by_one) < len(items)


def test_estimate():
    values = [[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]]
    found = report.estimate(values)
    assert found.mean == 0.625
    assert found.items_error == pytest.approx(statistics.stdev([1, 0, 0.5, 1]) / 2)
    assert found.seeds_error == pytest.approx(statistics.stdev([0.75, 0.5]) / 2**0.5)
    assert found.error == pytest.approx(
        (found.items_error**2 + found.seeds_error**2) ** 0.5  # type: ignore[operator]
    )
    assert report.estimate(values[:1]).seeds_error is None


@pytest.mark.parametrize(
    "gain, seeds, words",
    [
        (0.004, 2, r"\+0.4 points is within its standard error of 1.0 .*shows no difference"),
        (-0.015, 2, "-1.5 points is 1.5 times its standard error of 1.0 .*no evidence .12.7 times"),
        (0.03, 5, "3.0 times its standard error .*5 seeds.: more than chance explains"),
        (0.03, 1, "spread between seeds is not in it.: more seeds are needed"),
    ],
)
def test_reading_is_honest(gain, seeds, words):
    results = {
        "difference": {"of": "adarank - uniform", "accuracy": gain, "error": 0.01},
        "arms": {"adarank": {"step_seconds": 0.5}},
        "settings": {
            "held_out_items": 1000,
            "seeds": list(range(seeds)),
            "train_items": 64,
            "batch_size": 32,
            "epochs": 1,
        },
        "prediction_seconds": 3.0,
    }
    line, cost = report.reading(results)
    assert re.search(words, line)
    assert cost == "Predicting the ranks took 3.0 s, one training run about 1 s."


def test_report_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        demo.prepare_folder(tmp_path / "file")
    assert demo.prepare_folder(tmp_path / "new" / "folder").is_dir()
