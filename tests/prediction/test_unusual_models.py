"""Models that take batches in their own way: each is probed right, if need be one by one."""

import pytest
import torch
import transformers
from torch import nn

import adarank_fast as ada
from adarank_fast.models.targets import find_targets
from adarank_fast.prediction.folding import ACROSS_ITEMS, FOLDED
from bench.naive import naive_disagreements
from tests.tiny_models import batch, spread, tiny

SIZES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=40,
)
TEXT = dict(SIZES, num_key_value_heads=1)


def predict(model, batches, **options):
    options = dict(target_modules="all-linear", trials=2, progress=False) | options
    return ada.predict_ranks(model, batches, 2, **options)


def check(model, batches, read=lambda outputs, _: outputs, **options):
    """The plan, once its scores are those of the naive loop."""
    plan = predict(model, batches, **options)
    modules = {t.name: t.path for t in find_targets(model, "all-linear")}
    naive = naive_disagreements(model, batches, modules, read, 2)
    for name, values in naive.items():
        assert plan.scores[name].trials == pytest.approx(values, rel=1e-4, abs=1e-7)
    return plan


def reasons(plan):
    return set(plan.settings["routes"].values())


class Net(nn.Module):
    """Two linear layers, called as `call` says, on what `prepare` makes of the input."""

    def __init__(self, prepare=lambda x: x, call=lambda linear, x: linear(x)):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.prepare, self.call = prepare, call

    def forward(self, x):
        x = self.prepare(x)
        for layer in self.layers:
            x = self.call(layer, x).tanh()
        return x


def only(allowed, error=ValueError):
    """Refuses all batch sizes but those allowed."""

    def prepare(x):
        if len(x) not in allowed:
            raise error(f"{len(x)} rows")
        return x

    return prepare


@pytest.mark.parametrize("error", [ValueError, AssertionError, IndexError, NotImplementedError])
@pytest.mark.parametrize("allowed", [{3}, {2, 3}, {3, 6}, {2, 3, 4}, {1, 2, 3, 4}], ids=str)
def test_batch_sizes_that_a_model_rejects(allowed, error):
    plan = check(Net(only(allowed, error)), [{"x": torch.randn(3, 6)}])
    assert all(reason.startswith("the model rejects") for reason in reasons(plan))


def test_a_model_that_leaves_out_what_is_too_much():
    assert FOLDED not in reasons(check(Net(lambda x: x[:3]), [{"x": torch.randn(3, 6)}]))


@pytest.mark.parametrize("items", [1, 4])
def test_items_that_change_one_another(items):
    """The clean pass over a doubled batch does not show it."""
    model = Net(call=lambda linear, x: (y := linear(x)) + y.mean(0))
    assert reasons(check(model, [{"x": torch.randn(items, 6)}])) == {ACROSS_ITEMS}


@pytest.mark.parametrize(
    "call", [lambda linear, x: linear(input=x), lambda linear, x: linear.forward(input=x)]
)
def test_a_linear_called_by_name(call):
    assert reasons(check(Net(call=call), [{"x": torch.randn(3, 6)}])) == {FOLDED}


def test_a_model_that_names_every_argument():
    """Embedding, convolution, Conv1D, block and linear."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(6, 6), transformers.pytorch_utils.Conv1D(6, 6)

        def forward(self, hidden, scale=1.0):
            return self.k(x=self.q(input=hidden).tanh()) * scale

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.ModuleDict({"e": nn.Embedding(9, 6), "n": nn.LayerNorm(6)})
            self.conv = nn.Conv1d(6, 6, 1)
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            x = self.embed["n"](input=self.embed["e"](input=x))
            x = self.conv(input=x.mT).mT
            for layer in self.layers:
                x = layer(scale=2.0, hidden=x)
            return x[:, -1]

    torch.manual_seed(0)
    inputs = {"x": torch.randint(9, (3, 5))}
    assert reasons(check(spread(Named()), [inputs])) == {FOLDED}


def test_inputs_in_a_list_or_a_tuple():
    class Parts(Net):
        def forward(self, x, more):
            return super().forward(x + sum(more))

    inputs = {"x": torch.randn(3, 6), "more": [torch.randn(3, 6), torch.randn(3, 6)]}
    assert reasons(check(Parts(), [inputs])) == {FOLDED}
    assert reasons(check(Parts(), [inputs | {"more": tuple(inputs["more"])}])) == {FOLDED}

    class Items(Net):
        """A list with an element for each item."""

        def forward(self, x, more):
            return super().forward(x + torch.stack(more))

    inputs["more"] = list(torch.randn(3, 6))
    assert FOLDED not in reasons(check(Items(), [inputs]))


@pytest.mark.parametrize("outside", [False, True], ids=["batch", "call"])
def test_batches_made_in_inference_mode(outside):
    with torch.inference_mode():
        inputs = batch("bert", lengths=(9, 5))
    model, want = tiny("bert"), predict(tiny("bert"), [batch("bert", lengths=(9, 5))])
    with torch.inference_mode(outside):
        plan = predict(model, [inputs])
        models = [tiny("bert"), spread(tiny("bert"))]
        assert ada.model_disagreement(models, [inputs])[0, 1] > 0
    assert plan.scores == want.scores
    model(**batch("bert")).last_hidden_state.sum().backward()


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny("bert")
    inputs = [batch("bert", lengths=(9, 5))]
    assert predict(model, inputs).scores == predict(tiny("bert"), inputs).scores


def test_a_3d_parameter_of_the_model_itself():
    class Root(Net):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 6, 6))

        def forward(self, x):
            return torch.einsum("bd,edk->bk", super().forward(x), self.experts)

    model, inputs = Root(), [{"x": torch.randn(4, 6)}]
    assert check(model, inputs).ranks.keys() == {"layers.0", "layers.1"}
    plan = predict(model, inputs, target_modules=["experts", "layers.1"])
    assert all(score.mean > 0 for score in plan.scores.values()) and len(plan.scores) == 2


def qwen2_vl():
    """Patches of all images in one tensor, which says nothing of items."""
    config = transformers.Qwen2VLConfig(
        text_config=dict(
            TEXT,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]},
        ),
        vision_config=dict(
            embed_dim=16, depth=1, num_heads=2, hidden_size=16, patch_size=2, mlp_ratio=2
        ),
        image_token_id=7,
        vision_start_token_id=8,
        video_token_id=9,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    ids = torch.randint(10, 40, (3, 9))
    ids[:, 1], ids[:, 2:4] = 8, 7
    grid = torch.tensor([[1, 2, 4]] * 3)
    pixels = torch.randn(3 * 8, 3 * 2 * 2 * 2)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid}
    return model, inputs | {"mm_token_type_ids": (ids == 7).long()}


def llava(images):
    """Items have other numbers of images."""
    vision = dict(SIZES, image_size=8, patch_size=4, projection_dim=16)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=7,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    ids = torch.randint(10, 40, (len(images), 4 * max(images) + 3))
    for row, count in enumerate(images):
        ids[row, : 4 * count] = 7
    return model, {"input_ids": ids, "pixel_values": torch.randn(sum(images), 3, 8, 8)}


@pytest.mark.parametrize(
    ("make", "folds"),
    [(qwen2_vl, False), (lambda: llava([1, 1, 1]), True), (lambda: llava([1, 2, 1]), False)],
    ids=["qwen2_vl", "llava", "llava, one or two images"],
)
def test_packed_images(make, folds):
    torch.manual_seed(0)
    model, inputs = make()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, -2:] = 0  # padded, but not to be taken apart
    plan = check(
        spread(model),
        [inputs],
        lambda out, _: out.logits[:, 0],
        output=lambda out: out.logits[:, 0],
    )
    assert (FOLDED in reasons(plan)) == folds
    assert predict(model, [inputs], output="logits", trials=1).scores


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_items_longer_than_the_position_table(kind):
    model = tiny(kind)
    length = model.config.max_position_embeddings + 3
    inputs = [batch(kind), batch(kind, lengths=(length,))]
    with pytest.raises(ada.AdarankError, match=f"{length - 3}; use shorter items") as caught:
        predict(model, inputs)
    assert "\n" not in str(caught.value)
    inputs[1] = {**batch(kind), "input_ids": torch.full((4, 9), 99)}
    with pytest.raises(ada.AdarankError, match="has 90 rows and is asked for 99"):
        predict(model, inputs)
