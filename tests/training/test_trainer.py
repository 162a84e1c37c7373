"""The training loop: what it learns, the order it takes, going on after a kill, saving."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import set_seed

from adarank_fast.adapters.inject import inject
from adarank_fast.models.targets import find_targets
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.training import trainer as training
from adarank_fast.training.evaluation import evaluate
from adarank_fast.training.loading import MeanPoolClassifier, load_model
from adarank_fast.training.tokens import IGNORED, encode_blocks, encode_labelled
from adarank_fast.training.trainer import LengthGroups, Recipe, Training, Watch, fit
from tests.tiny_models import tiny
from tests.tiny_texts import EXAMPLES, save_tiny, tokenizer

TEXTS, LABELS = zip(*EXAMPLES, strict=True)
ITEMS = encode_labelled(tokenizer(), TEXTS, LABELS, ["a", "b"], 64)


def classifier(plan=None, seed=0):
    set_seed(seed)
    model = MeanPoolClassifier(tiny("bert", layers=2), 2)
    return inject(model, plan or RankPlan.uniform(model, 4), modules_to_save=["head"])


def test_training_learns():
    model = classifier()
    found = fit(model, ITEMS[:40], 0, Recipe(12, 8, 1e-2))
    assert len(found.losses) == len(found.seconds) == 60
    assert found.tokens == 12 * sum(len(item["input_ids"]) for item in ITEMS[:40])
    assert found.diverged is None
    assert found.curve()[-1][1] < 0.5 * found.curve()[0][1]
    evaluation = evaluate(model, ITEMS[:40], 0)
    assert (evaluation.predictions.argmax(-1) == evaluation.labels).mean() > 0.9


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        groups = LengthGroups(ITEMS, 8, seed)
        groups.set_epoch(epoch)
        return list(groups)

    assert sorted(order(0, 0)) == list(range(len(ITEMS)))
    first = order(3, 1)
    torch.rand(5)
    assert order(3, 1) == first
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4
    lengths = [len(ITEMS[i]["input_ids"]) for i in first[:56]]
    spread = [max(lengths[i : i + 8]) - min(lengths[i : i + 8]) for i in range(0, 56, 8)]
    assert max(spread) <= 2


def test_arms_see_the_items_alike_and_start_from_the_same_head(monkeypatch):
    seen: list[list] = []

    def collate(items, pad, original=training.collate):
        seen[-1].append([tuple(item["input_ids"]) for item in items])
        return original(items, pad)

    monkeypatch.setattr(training, "collate", collate)
    targets = find_targets(tiny("bert", layers=2))
    sizes = {t.name: (t.in_features, t.out_features) for t in targets}
    mixed = RankPlan({t.name: i % 4 for i, t in enumerate(targets)}, sizes)
    heads = []
    for plan in (mixed, None):
        seen.append([])
        model = classifier(plan)
        fit(model, ITEMS[:40], 0, Recipe(2, 8, 0.0))
        heads.append(model.base_model.model.head.modules_to_save["default"].weight)
    assert seen[0] == seen[1] and len(seen[0]) == 10
    assert torch.equal(*heads)


def test_classifier_pools_over_unmasked_positions():
    model = MeanPoolClassifier(tiny("bert"), 3).eval()
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask = (ids > 0).long()
    both = model(ids, mask)["logits"]
    alone = model(ids[:1, :3], mask[:1, :3])["logits"]
    torch.testing.assert_close(both[:1], alone)
    assert {t.name for t in find_targets(model)} == {t.name for t in find_targets(model.encoder)}


def test_evaluate_classification():
    model = MeanPoolClassifier(tiny("bert"), 2).eval()
    found = evaluate(model, ITEMS, 0, batch_size=7)
    for index, item in enumerate(ITEMS[:5]):
        with torch.no_grad():
            logits = model(torch.tensor([item["input_ids"]]), torch.ones(1, len(item["input_ids"])))
        expected = -logits["logits"][0].double().log_softmax(-1)[item["labels"]]
        torch.testing.assert_close(torch.tensor(found.predictions[index]), logits["logits"][0])
        assert found.losses[index] == pytest.approx(float(expected), rel=1e-5)
    assert found.labels.tolist() == [item["labels"] for item in ITEMS]
    assert set(found.counts.tolist()) == {1}


def test_evaluate_language_model():
    model = tiny("llama", layers=2)
    items = encode_blocks(tokenizer(), TEXTS, 16)
    items[1]["labels"] = [IGNORED] * 4 + items[1]["labels"][4:]
    items[2] = {key: value[:9] for key, value in items[2].items()}
    found = evaluate(model, items[:4], 0, batch_size=3)
    assert found.counts.tolist() == [15, 12, 8, 15]
    assert found.predictions.shape == found.labels.shape == (50,)
    for item, loss, count in zip(items[:4], found.losses, found.counts, strict=True):
        with torch.no_grad():
            ids = torch.tensor([item["input_ids"]])
            own = model(input_ids=ids, labels=torch.tensor([item["labels"]])).loss
        assert loss / count == pytest.approx(float(own), rel=1e-4)


@pytest.mark.parametrize(
    "losses, said",
    [
        ([1.0, 0.8, 0.5], None),
        ([1.0, math.nan, 0.5], "training loss nan at step 2"),
        ([1.0, 1.5, 2.5], "training loss rose from 1 to 2.5"),
        ([], None),
    ],
)
def test_diverged(losses, said):
    assert Training(losses).diverged == said


def test_what_a_run_has_seen_survives_its_checkpoint():
    watch = Watch()
    for loss in (0.5, math.nan):
        watch.on_step_begin(None, None, None)
        watch.batch(torch.tensor(loss), {"attention_mask": torch.tensor([[1, 1, 0]])})
        watch.batch(torch.tensor(0.25), {"input_ids": torch.zeros(1, 3)})
        watch.on_step_end(None, None, None)
    again = Watch.from_state(json.loads(json.dumps(watch.state())))
    found = again.training()
    assert found.losses[0] == 0.75 and found.tokens == 10 and len(found.seconds) == 2
    assert found.diverged == "training loss nan at step 2"


def test_training_stops_where_the_loss_is_not_finite():
    found = fit(classifier(), ITEMS[:40], 0, Recipe(40, 8, 1e30))
    assert found.diverged
    assert len(found.losses) < 200


@pytest.mark.parametrize("argument, value", [("epochs", 0), ("batch_size", 1.5), ("max_steps", -1)])
def test_recipe_says_no(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a positive integer, got {value}"):
        Recipe(**{argument: value})
    with pytest.raises(ValueError, match="learning_rate must be"):
        Recipe(learning_rate=math.nan)


@pytest.mark.parametrize("kind, task", [("bert", "classification"), ("llama", "causal-lm")])
def test_four_bit_base(tmp_path, kind, task):
    folder = save_tiny(kind, tmp_path / "model")
    set_seed(0)
    model, lora_config = load_model(str(folder), task, ["a", "b"], four_bit=True)
    assert model.is_loaded_in_4bit
    peft_model = inject(model, RankPlan.uniform(model, 2), **lora_config)
    items = ITEMS if task == "classification" else encode_blocks(tokenizer(), TEXTS, 16)
    found = fit(peft_model, items[:16], 0, Recipe(6, 8, 1e-2))
    assert found.losses[-1] < found.losses[0]
    changed = [p for n, p in peft_model.named_parameters() if "lora_B" in n]
    assert all(p.abs().max() > 0 for p in changed)
