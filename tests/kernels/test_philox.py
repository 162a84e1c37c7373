import pytest
import torch

from adarank_kernels import philox_normal, philox_normal_ref
from adarank_kernels.lora.dropout import keep_mask
from adarank_kernels.random import philox
from adarank_kernels.random.philox import words_of
from adarank_kernels.random.reference import philox_words_ref
from adarank_kernels.random.words import key_tensor, philox_words, uniform_from_words
from adarank_kernels.runtime import native

# As drawn by the first release: plans made then must be made again.
PINNED = [1.53377831, -0.63036144, -0.35869935, 0.11006770, -0.46694282, 0.10247138, -1.03088462]


@pytest.fixture(params=["compiled", "torch"])
def words_by(request, monkeypatch):
    """Large calls once with the C++ operator, if it can be built here, and once without."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_loaded", False)
    return request.param == "compiled" and native.operators() is not None


def test_words_are_those_of_random123():
    """The known-answer vectors of Philox4x32-10 in Random123's kat_vectors."""
    words = philox_words(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    assert [int(w) & 0xFFFFFFFF for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("first", [0, 2**31 - 2, 2**32 - 3, 2**33 - 1])
@pytest.mark.parametrize("seed", [1, 2**62 + 5, 2**63, 2**64 - 3])
def test_words_of_counters_beyond_32_bits(words_by, first, seed):
    """As integers in Python: no tensor that fits here has so many elements."""
    words = words_of(key_tensor(seed, torch.device("cpu")), first, 6, native=words_by)
    expected = [philox_words_ref(seed, counter) for counter in range(first, first + 6)]
    assert [[int(w) & 0xFFFFFFFF for w in column] for column in words.t()] == expected


def test_uniforms_fold_negative_words():
    words = torch.tensor([0, 3, -1, -4, 2**31 - 1, -(2**31), 2**30 + 64], dtype=torch.int32)
    folded = torch.tensor([0, 3, 0, 3, 2**31 - 1, 2**31 - 1, 2**30], dtype=torch.float32)
    assert torch.equal(uniform_from_words(words), folded * 4.6566127342e-10)


@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (3, 7), (2, 3, 11)])
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 7, 2**62 + 1, 2**63, 2**64 - 1])
def test_matches_integers_and_float64(shape, seed):
    ours = philox_normal(shape, seed)
    reference = philox_normal_ref(shape, seed, dtype=torch.float64)
    assert ours.shape == reference.shape == shape and ours.dtype == torch.float32
    assert ours.untyped_storage().nbytes() == (ours.numel() + 3) // 4 * 16
    torch.testing.assert_close(ours.double(), reference, atol=5e-6, rtol=0)


def test_compiled_words_are_torchs():
    operators = native.operators()
    if operators is None:
        pytest.skip("no C++ compiler")
    key, first, row = -(2**40) - 3, 2**32 - 5, 7  # the counter's low word carries
    ours = operators.philox(key, first, row, 3, 11)
    counters = first + torch.arange(11)
    rows = (row + torch.arange(3))[:, None] + (counters >> 32)
    expected = philox_words(torch.tensor([key]), counters & 0xFFFFFFFF, rows)
    assert torch.equal(ours, torch.stack([word.expand(3, 11) for word in expected]))
    assert operators.philox(key, first, row, 0, 11).shape == (4, 0, 11)
    with pytest.raises(RuntimeError, match="adarank: philox of"):
        operators.philox(key, first, row, -1, 11)


def test_pinned_numbers(words_by):
    """First, middle and last of a stream long enough for the compiled form."""
    normals = philox_normal((100_001,), 2**64 - 3)
    chosen = normals[[0, 1, 2, 3, 65535, 65536, 100_000]]
    torch.testing.assert_close(chosen, torch.tensor(PINNED), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 1.0])
def test_masks(words_by, dropout):
    """Bit i of the mask from Python integers; sizes for the compiled form, both chunk edges."""
    seed, rows, columns = 2**62 + 12345, 515, 131
    mask = keep_mask(torch.tensor([seed]), rows, columns, dropout)
    assert mask.shape == (rows, columns) and mask.dtype == torch.bool
    for row, column in [(0, 0), (0, 130), (255, 7), (256, 8), (514, 130), (511, 129), (3, 77)]:
        words = philox_words(*(torch.tensor([v]) for v in (seed, column // 8, row)))
        half = int(words[column % 8 // 2]) >> 16 * (column % 2) & 0xFFFF
        assert mask[row, column] == (half >= round(dropout * 65536))
    assert abs(mask.float().mean() - (1 - dropout)) < 0.01


def test_a_mask_made_in_one_go_is_the_same():
    """As of a seed whose type a mode or a compiler may stand behind."""
    seed = torch.tensor([2**62 + 12345])
    whole = keep_mask(torch.nn.Parameter(seed, requires_grad=False), 515, 131, 0.3)
    assert torch.equal(whole, keep_mask(seed, 515, 131, 0.3))


def test_an_element_depends_on_its_index_alone(words_by):
    long = philox_normal((300_001,), seed=3)
    torch.testing.assert_close(philox_normal((200_003,), seed=3), long[:200_003], rtol=0, atol=0)
    torch.testing.assert_close(
        philox_normal((100_000, 3), seed=3).flatten(), long[:300_000], rtol=0, atol=0
    )


@pytest.mark.parametrize("built", [True, False])
def test_who_makes_the_words(monkeypatch, built):
    """C++ for calls that are worth building it, a chunk at a time."""
    made = []

    def noted(key, first, count, native):
        made.append((first, count, native))
        return torch.zeros(4, count, dtype=torch.int32)

    monkeypatch.setattr(philox, "WORTH_BUILDING", 64)
    monkeypatch.setattr(philox, "COUNTERS_PER_CHUNK", 8)
    monkeypatch.setattr(philox, "operators", lambda: object() if built else None)
    monkeypatch.setattr(philox, "words_of", noted)
    for counters, chunks in ((15, [(0, 8), (8, 7)]), (16, [(0, 8), (8, 8)]), (8, [(0, 8)])):
        philox.fill_in_torch(torch.empty(counters, 4), 3)
        assert made == [(*chunk, built and counters == 16) for chunk in chunks]
        made.clear()


def test_which_kernel_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(philox, "ready", lambda *of: asked.append(of))
    philox_normal((5,), 3)
    assert asked == [("philox_normal", torch.device("cpu"), torch.bfloat16)]


def test_moments_and_independence_of_seeds():
    first, second = philox_normal((400_000,), 1).double(), philox_normal((400_000,), 2).double()
    assert abs(first.mean()) < 0.006 and abs(first.std() - 1) < 0.006
    assert abs((first**3).mean()) < 0.02 and abs((first**4).mean() - 3) < 0.05
    assert abs((first * second).mean()) < 0.006
    assert abs((first[1:] * first[:-1]).mean()) < 0.006


def test_dtype_rounds_once():
    single = philox_normal((64, 64), 5)
    torch.testing.assert_close(
        philox_normal((64, 64), 5, dtype=torch.bfloat16), single.bfloat16(), rtol=0, atol=0
    )


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_must_fit(seed):
    with pytest.raises(ValueError, match="seed must be in"):
        philox_normal((3,), seed)
    with pytest.raises(ValueError, match="negative size"):
        philox_normal((2, -1), 0)
