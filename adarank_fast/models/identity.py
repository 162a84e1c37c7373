"""Digests: what tells one model, one data set or one function from another.

Tensors are read once, where they are, as whole numbers of 64 bits w[0], w[1], ... A block of them
is summed up as sum(c[i] * (w[i] ^ (w[i] >> 32))) modulo 2^64, with fixed random odd c. A change of
one number always changes the sum. Another change, such as two values exchanged or a sign, is
missed with a chance of about 2^-32. This finds mistakes, not forgeries. SHA-256 over names,
types, shapes and these sums is the digest, the same on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import groupby
from typing import TypedDict

import numpy
import numpy.typing
import torch
from torch import Tensor, nn

from adarank_fast.errors import AdarankError
from adarank_fast.models.bitsandbytes_private import scales

Words = numpy.typing.NDArray[numpy.int64]
BLOCK = 2**16  # numbers that one sum is over
BLOCKS = {"cpu": 4, "cuda": 32}  # blocks at a time: in the cache of a core, few launches on a GPU
SIGNS = 8  # projections of an output
OUTPUT_TOLERANCE = 0.01, 0.1  # of its scale, of its projections: more than 16-bit rounding


def digest_weights(model: nn.Module) -> str:
    """SHA-256 over all parameters and buffers: names, types, shapes and every bit.

    Packed weights are read as they are stored, with their scales.

    Raises:
        AdarankError: a tensor is on the meta device.
    """
    digest = _Digest()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.add(name, tensor)
    for name, module in model.named_modules():
        for part, tensor in scales(module).items():
            digest.add(f"{name}.{part}", tensor)
    return digest.hexdigest()


def digest_data(items: Iterable[Mapping[str, object]]) -> str:
    """SHA-256 over keys and values, in the order of the items.

    Args:
        items: batches or examples: tensors and plain values, nested at will.
    """
    digest = _Digest()
    for item in items:
        digest.add("item", item)
    return digest.hexdigest()


class Fingerprint(TypedDict):
    """See `fingerprint`."""

    shape: list[int]
    scale: float
    projections: list[float]


def fingerprint(output: Tensor) -> Fingerprint:
    """A few numbers that describe an output: rounding hardly changes them, another function does.

    Args:
        output: any shape and dtype. What is not finite counts as 0.

    Returns:
        JSON values: "shape", "scale" (root mean square) and "projections" on eight random vectors
        of signs, in units of what they come to for random values.
    """
    bits = torch.arange(8, 8 + SIGNS, device=output.device)
    coefficients = _coefficients(output.device)[: output.numel(), None]
    signs = ((coefficients >> bits) & 1).double() * 2 - 1
    sums = signs.new_zeros(SIGNS + 1)  # of the projections, and of squares
    for part in output.detach().reshape(-1).split(BLOCK):
        part = torch.nan_to_num(part.to(signs), posinf=0.0, neginf=0.0)
        sums += torch.cat([part @ signs[: len(part)], (part @ part)[None]])
    *projections, square = sums.tolist()
    return {
        "shape": list(output.shape),
        "scale": math.sqrt(square / max(output.numel(), 1)),
        "projections": [value / (math.sqrt(square) or 1.0) for value in projections],
    }


def same_output(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two fingerprints are of the same output, but for rounding."""
    of_scale, of_projections = OUTPUT_TOLERANCE
    close = zip(one["projections"], other["projections"], strict=True)
    return (
        one["shape"] == other["shape"]
        and math.isclose(one["scale"], other["scale"], rel_tol=of_scale)
        and all(math.isclose(a, b, rel_tol=0, abs_tol=of_projections) for a, b in close)
    )


def qualified_name(function: Callable[..., object]) -> str:
    """Module and name of a function; of the class, where it is an object that can be called."""
    name = getattr(function, "__qualname__", None)
    if name is None:
        function, name = type(function), type(function).__qualname__
    return f"{function.__module__}:{name}"


class _Digest:
    """Names and values as they come; tensors' sums stay where they are until the end."""

    def __init__(self) -> None:
        self.text = hashlib.sha256()
        self.sums: list[Tensor] = []
        self.seen: set[int] = set()

    def add(self, name: object, value: object) -> None:
        if isinstance(value, Tensor):
            self._add_tensor(name, value.detach())
        elif isinstance(value, Mapping):
            self._say(name, "mapping", len(value))
            for key, part in sorted(value.items(), key=lambda pair: str(pair[0])):
                self.add(key, part)
        elif isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
            self.add(name, torch.from_numpy(numpy.ascontiguousarray(value)))
        elif _says_all(value) or isinstance(value, (list, tuple)) and all(map(_says_all, value)):
            self._say(name, value)
        elif isinstance(value, (list, tuple)):
            self._say(name, "sequence", len(value))
            for number, part in enumerate(value):
                self.add(number, part)
        else:  # not its repr, which may hold an address
            self._say(name, type(value).__qualname__)
            if id(value) not in self.seen:  # objects may hold each other
                self.seen.add(id(value))
                self.add("fields", getattr(value, "__dict__", {}))

    def hexdigest(self) -> str:
        for _, group in groupby(self.sums, key=lambda sums: sums.device):
            self.text.update(torch.cat(list(group)).cpu().numpy().tobytes())
        return self.text.hexdigest()

    def _say(self, *words: object) -> None:
        self.text.update(f"{words!r}\n".encode())

    def _add_tensor(self, name: object, tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's: packed numbers, scales, ...
            self._say(name, type(tensor).__name__, tuple(tensor.shape))
            for part in tensor.__tensor_flatten__()[0]:
                self.add(part, getattr(tensor, part))
            return
        if tensor.is_meta:
            raise AdarankError(f"{name} is on the meta device; load the weights first")
        self._say(name, str(tensor.dtype), tuple(tensor.shape))
        self.sums += _sums(tensor)


def _says_all(value: object) -> bool:
    """Whether the text of a value is all that it is."""
    return isinstance(value, (int, float, str, bytes, type(None)))


@torch.no_grad()
def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """The sums of its blocks, [number of blocks in all] int64."""
    flat = (
        tensor.as_subclass(Tensor)
        .resolve_conj()
        .resolve_neg()
        .contiguous()
        .view(-1)
        .view(torch.uint8)
    )
    coefficients = _coefficients(tensor.device)
    mixed = numpy.empty(min(BLOCK, len(flat) // 8 + 1), numpy.int64)
    size = 8 * BLOCK * BLOCKS.get(tensor.device.type, 4)
    for part in flat.split(size):
        if len(part) % 8:
            part = nn.functional.pad(part, (0, -len(part) % 8))
        elif part.data_ptr() % 8 or part.storage_offset() % 8:
            part = part.clone()
        words = part.view(torch.int64)
        whole = len(words) // BLOCK * BLOCK
        for block in (words[:whole].view(-1, BLOCK), words[None, whole:]):
            chosen = coefficients[: block.shape[1]]
            if block.numel() and block.is_cpu:
                yield _with_numpy(block.numpy(), chosen.numpy(), mixed[: len(chosen)])
            elif block.numel():
                yield _with_torch(block, chosen)


def _with_torch(block: Tensor, coefficients: Tensor) -> Tensor:
    """The sum of each row; its words are mixed, else two changed signs would cancel out."""
    return (block >> 32).bitwise_xor_(block).mul_(coefficients).sum(1)


def _with_numpy(block: Words, coefficients: Words, mixed: Words) -> Tensor:
    """The same on a CPU in less than half of the time; overwrites `mixed`."""
    sums = numpy.empty(len(block), numpy.int64)
    for number, words in enumerate(block):
        numpy.bitwise_xor(numpy.right_shift(words, 32, out=mixed), words, out=mixed)
        sums[number] = numpy.dot(mixed, coefficients)
    return torch.from_numpy(sums)


@lru_cache(maxsize=4)
def _coefficients(device: torch.device) -> Tensor:
    """[BLOCK] random odd numbers, int64; the same everywhere."""
    random = bytearray(hashlib.shake_256(b"adarank").digest(8 * BLOCK))
    return (torch.frombuffer(random, dtype=torch.int64) | 1).to(device)
