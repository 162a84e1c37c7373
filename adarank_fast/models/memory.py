"""How much memory probing may use, and a forward uses: bytes, counted from the tensors."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adarank_fast.models.batches import Batch
from adarank_fast.models.torch_private import TorchDispatchMode, leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def reset_peak_memory() -> None:
    """Start a new measurement of `peak_memory`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: the high-water mark of resident memory


def peak_memory() -> int | None:
    """Most bytes since `reset_peak_memory`: of the GPU, else resident ones of the whole process.

    None where the system does not tell (it is Linux that does).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


LEAST = 64 * 2**20  # what a small model may take: less than the libraries themselves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make inside the context and that are alive at one time.

    Unlike an allocator's statistics it knows the CPU, and gives the same number on every run.

    Attributes:
        peak: the most bytes so far.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.peak = self._alive = 0
        self._counted: dict[
            int, weakref.ref[torch.UntypedStorage]
        ] = {}  # by id; forgets a storage when it dies

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        for leaf in leaves((args, kwargs)):
            self._count(leaf, 0)  # made elsewhere, or counted already
        output = func(*args, **kwargs)
        for leaf in leaves(output):
            self._count(leaf)
        return output

    def _count(self, leaf: object, size: int | None = None) -> None:
        if not isinstance(leaf, Tensor):
            return
        storage = leaf.untyped_storage()
        if id(storage) in self._counted:
            return
        size = storage.nbytes() if size is None else size
        self._counted[id(storage)] = weakref.ref(storage, partial(self._forget, id(storage), size))
        self._alive += size
        self.peak = max(self.peak, self._alive)

    def _forget(self, key: int, size: int, _: object) -> None:
        del self._counted[key]
        self._alive -= size


@dataclass(frozen=True)
class Memory:
    """The memory that probing may use beside the model, its clean outputs and blocks' outputs.

    Attributes:
        total: bytes.
    """

    total: int

    @property
    def activations(self) -> int:
        """For the folded forward."""
        return self.total // 2

    @property
    def noise(self) -> int:
        """For the noise of the trials of a pass."""
        return self.total // 4

    @property
    def linear_cache(self) -> int:
        """For inputs and outputs of the open block's linear layers."""
        return self.total // 4


def default_memory(
    model: nn.Module, parts: Sequence[Batch], live: Sequence[int], batches: Sequence[Batch]
) -> Memory:
    """On a GPU half of what is free; elsewhere what keeps a prediction near a forward's memory.

    model + probing <= 1.5 (model + forward over the largest batch): half of the model's bytes and
    1.5 times the forward's, or `LEAST`. A GPU's memory is of no use to others while the
    prediction runs, and with little of it the card waits for Python.

    Args:
        model: whose parameters and buffers are held anyway.
        parts: the batches as they are probed.
        live: for each of them, what a forward holds at most, bytes.
        batches: the batches as they were given.
    """
    held = {t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    a_position = max(size / tokens(part) for size, part in zip(live, parts, strict=True))
    forward = a_position * max(map(tokens, batches))
    least = max(LEAST, int(sum(s.nbytes() for s in held) / 2 + 1.5 * forward))
    device = next((s.device for s in held if s.device.type == "cuda"), None)
    return Memory(least if device is None else max(least, free_bytes(device) // 2))


def free_bytes(device: torch.device) -> int:
    """Of a GPU: what the driver has left, and what torch holds without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def tokens(batch: Batch) -> int:
    """B T, of the largest input."""
    return max(v.shape[:2].numel() for v in batch.values() if isinstance(v, Tensor) and v.dim())
