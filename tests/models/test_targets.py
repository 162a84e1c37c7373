import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from adarank_fast.models.targets import canonical_name, find_blocks, find_targets, unwrap
from tests.tiny_models import tiny


def names(model, target_modules):
    return [t.name for t in find_targets(model, target_modules)]


def test_attention_includes_the_output_projection():
    found = names(tiny("bert", layers=2), "attention")
    parts = ("self.query", "self.key", "self.value", "output.dense")
    assert found == [f"encoder.layer.{i}.attention.{part}" for i in range(2) for part in parts]


def test_attention_of_llama_gpt2_and_t5():
    found = names(tiny("llama", layers=1), "attention")
    assert [n.rsplit(".", 1)[-1] for n in found] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    gpt2 = find_targets(tiny("gpt2", layers=1), "attention")
    assert [(t.name, t.in_features, t.out_features) for t in gpt2] == [
        ("h.0.attn.c_attn", 32, 96),
        ("h.0.attn.c_proj", 32, 32),
    ]
    assert (
        len(names(tiny("t5", layers=1), "attention")) == 12
    )  # one encoder, two decoder attentions


def test_all_linear_leaves_heads_and_poolers():
    assert not any("pooler" in n for n in names(tiny("bert"), "all-linear"))
    found = names(tiny("llama", layers=1), "all-linear")
    assert len(found) == 7 and "lm_head" not in found
    classifier = AutoModelForSequenceClassification.from_config(tiny("bert").config)
    assert names(classifier, "all-linear") == names(tiny("bert"), "all-linear")


def test_a_regex_matches_whole_names_and_a_list_suffixes():
    model = tiny("bert", layers=2)
    queries = [f"encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert names(model, r".*\.query") == queries
    assert names(model, ["query"]) == names(model, ["self.query"]) == queries
    assert names(model, queries[1:]) == queries[1:]
    assert names(model, ["value", "query"])[0] == queries[0]  # the model's order


def test_names_are_those_of_the_bare_base_model():
    model = tiny("bert", layers=1)
    classifier = AutoModelForSequenceClassification.from_config(model.config)
    assert names(classifier, "attention") == names(model, "attention")
    assert find_targets(classifier)[0].path.startswith("bert.encoder")
    compiled = torch.compile(classifier)
    assert names(compiled, "attention") == names(model, "attention")
    assert unwrap(compiled) is classifier
    name = "base_model.model._orig_mod.module.bert.encoder.layer.0.attention.self.query.base_layer"
    assert canonical_name(name, classifier) == "encoder.layer.0.attention.self.query"


def test_adapters_are_not_targets():
    from peft import LoraConfig, get_peft_model

    model = tiny("bert", layers=2)
    before = names(model, "all-linear")
    peft_model = get_peft_model(model, LoraConfig(target_modules=["query", "dense"]))
    assert names(peft_model, "all-linear") == before


def test_blocks_are_elements_of_outermost_lists():
    assert find_blocks(tiny("t5", layers=2)) == [
        "encoder.block.0",
        "encoder.block.1",
        "decoder.block.0",
        "decoder.block.1",
    ]
    blocks = {t.block for t in find_targets(tiny("llama", layers=2))}
    assert blocks == {"model.layers.0", "model.layers.1"}
    assert find_targets(nn.Sequential(nn.Linear(2, 3)), "all-linear")[0].block is None


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        ("quer", "matches no linear module.*near matches: query"),
        (["qeury"], "'qeury' matches no module; near matches: query"),
        (["query", "nothing_like_it"], "near matches: dense, key, query, value"),
        (["word_embeddings"], "names a Embedding, not a Linear"),
        ("(", "not a valid regex"),
        ([], "is empty"),
    ],
)
def test_what_matches_nothing_is_an_error(target_modules, message):
    with pytest.raises(ValueError, match=message):
        find_targets(tiny("bert"), target_modules)
    with pytest.raises(TypeError, match="must be a string or a list"):
        find_targets(tiny("bert"), 3)


def test_no_attention_lists_what_there_is():
    with pytest.raises(ValueError, match="found no Linear.*Sequential.*for example 0, 1"):
        find_targets(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)))
