"""Digests change with every bit that counts, and with nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from adarank_fast.models import identity
from adarank_fast.models.bitsandbytes_private import scales
from adarank_fast.models.identity import (
    BLOCK,
    digest_data,
    digest_weights,
    fingerprint,
    same_output,
)
from adarank_fast.models.quantization import unpacked
from tests.models.test_quantization import KINDS, load, logits
from tests.tiny_models import tiny

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
]


def module(*tensors):
    made = nn.Module()
    for number, tensor in enumerate(tensors):
        made.register_buffer(f"tensor{number}", tensor)
    return made


def digest(*tensors):
    return digest_weights(module(*tensors))


def values(size, dtype=torch.float32):
    made = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 50
    return (made > 0) if dtype is torch.bool else made.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 2 * BLOCK + 13])
def test_every_bit_counts(dtype, size):
    plain = values(size, dtype)
    bits = plain.view(torch.uint8)
    seen = {digest(plain)}
    places = {0, len(bits) // 3, len(bits) // 2, len(bits) - 1}
    for place in places:
        for bit in (1, 128):
            bits[place] ^= bit
            seen.add(digest(plain))
            bits[place] ^= bit
    assert len(seen) == 2 * len(places) + 1 and digest(plain) in seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("distance", [1, 2, 8, BLOCK, 2 * BLOCK])
def test_exchanged_values_and_changed_signs(dtype, distance):
    plain = values(5 * BLOCK, dtype)
    before = digest(plain)
    for first in range(9):
        pair = [first, first + distance]
        if plain[pair[0]] == plain[pair[1]]:
            continue
        for changed in (plain[pair[::-1]], -plain[pair]):
            other = plain.clone()
            other[pair] = changed
            assert digest(other) != before
    assert digest(plain.flip(0)) != before and digest(plain.roll(BLOCK)) != before


@pytest.mark.parametrize("size", [1, 40, BLOCK])
def test_a_cpu_and_other_devices_find_the_same_sums(size):
    block = torch.randint(-(2**63), 2**63 - 1, (3, size))
    coefficients = identity._coefficients(block.device)[:size]
    found = identity._with_numpy(
        block.numpy(), coefficients.numpy(), numpy.empty(size, numpy.int64)
    )
    assert torch.equal(found, identity._with_torch(block, coefficients))


def test_names_shapes_types_and_order_count():
    one, other = values(12), values(12) + 1
    plain = digest(one, other)
    assert plain != digest(other, one)
    assert plain != digest(one.view(3, 4), other)
    assert plain != digest(one.view(torch.int32), other)
    assert digest(torch.zeros(8)) != digest(torch.zeros(7), torch.zeros(1))
    assert digest(torch.zeros(0)) != digest(torch.zeros(0, 2))


def test_the_layout_does_not_count(monkeypatch):
    matrix = values(60).view(6, 10)
    plain = digest(matrix)
    storage = torch.cat([torch.zeros(1), matrix.flatten()])
    assert digest(storage[1:].view(6, 10)) == plain  # no whole number of 64 bits begins there
    assert digest(matrix.t().contiguous().t()) == plain
    assert digest(torch._neg_view(-matrix)) == plain
    assert digest(torch.zeros(6, 20)[:, ::2].copy_(matrix)) == plain
    large = digest(values(9 * BLOCK))
    monkeypatch.setitem(identity.BLOCKS, "cpu", 1)
    assert digest(values(9 * BLOCK)) == large


def test_parameters_and_buffers_of_all_modules_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.register_buffer("frequencies", torch.ones(2), persistent=False)
    seen = {digest_weights(model)}
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
        seen.add(digest_weights(model))
    assert len(seen) == len(tensors) + 1
    with pytest.raises(ValueError, match=r"tensor0 is on the meta device; load the weights first"):
        digest(torch.zeros(2, device="meta"))


def test_data():
    cache = SimpleNamespace(keys=torch.ones(2), parent=None)
    cache.parent = cache
    items = [
        {"ids": torch.tensor([1, 2])},
        {"ids": torch.tensor([1.0, 2.0])},
        {"ids": torch.tensor([1, 2 + 2**60])},
        {"ids": [1, 2]},
        {"ids": [[1], [2]]},
        {"ids": (torch.ones(2), None)},
        {"ids": (torch.zeros(2), None)},
        {"ids": {"more": torch.ones(2)}},
        {"ids": cache},
        {"ids": SimpleNamespace(keys=torch.zeros(2), parent=None)},
        {"ids": numpy.ones(2)},
        {"ids": numpy.zeros(2)},
        {"ids": True},
        {"ids": "True"},
        {"mask": True},
    ]
    assert len({digest_data([item]) for item in items}) == len(items)
    assert digest_data(items[:2]) == digest_data(items[:2]) != digest_data(items[1::-1])
    assert digest_data([dict(a=1, b=2)]) == digest_data([dict(b=2, a=1)])
    assert digest_data([{"f": object()}]) == digest_data([{"f": object()}])


def test_outputs_are_the_same_but_for_rounding():
    output = values((3, 50, 40))
    plain = fingerprint(output)
    for same in (output * 1.0001, output.bfloat16(), output.double()):
        assert same_output(fingerprint(same), plain)
    others = (100 * output, -output, output.flip(0), output.flip(1), output.exp(), output.relu())
    for other in (*others, output[:, :-1], output.flatten()):
        assert not same_output(fingerprint(other), plain)
    hidden = torch.full((2, 2), -torch.inf)
    assert same_output(fingerprint(hidden), fingerprint(hidden))
    assert not same_output(fingerprint(hidden), fingerprint(torch.ones(2, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_and_their_scales(tmp_path, kind):
    tiny("llama", layers=1, width=64).save_pretrained(tmp_path)
    model = load(tmp_path, kind).eval()
    layer = model.model.layers[0].self_attn.q_proj
    plain = digest_weights(model)
    with unpacked(model):
        logits(model)
        assert digest_weights(model) == plain
        if kind == "torchao int8":
            parts = [getattr(layer.weight, name) for name in layer.weight.__tensor_flatten__()[0]]
        else:
            parts = [layer.weight.data, *scales(layer).values()]
        assert len(parts) > 1
        for part in parts:
            part.view(torch.uint8).view(-1)[5] ^= 1
            assert digest_weights(model) != plain
            part.view(torch.uint8).view(-1)[5] ^= 1
        assert digest_weights(model) == plain
