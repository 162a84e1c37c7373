"""Several processes with a copy of the model each: who probes what, and putting it together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from adarank_fast.errors import AdarankError

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True)
class Processes:
    """This process among those of `torch.distributed`'s default group.

    Attributes:
        rank: number of this process.
        count: how many there are; 1 without a process group.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Processes:
        """This process among torch.distributed's; the only one where that is not initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def share(self, items: Sequence[T]) -> list[T]:
        """The part of `items` that is this process's; every process passes the same."""
        return list(items[self.rank :: self.count])

    def same(self, what: str, value: Mapping[str, object]) -> None:
        """Check that every process has the same value.

        Raises:
            AdarankError: on every process, if one differs.
        """
        for rank, other in enumerate(self._gather(dict(value))):
            odd = [key for key in value if other.get(key) != value[key]]
            if odd:
                raise AdarankError(
                    f"process {rank} and process {self.rank} have different {what} ({odd[0]}); "
                    "give every process the same model and batches"
                )

    def merge(self, found: dict[K, float], error: Exception | None) -> dict[K, float]:
        """Exchange and join what the processes found.

        Args:
            found: this process's part.
            error: what went wrong in this process; raised in all of them, so that none waits.
        """
        parts = self._gather((found, None if error is None else str(error)))
        if error:
            raise error
        for rank, (_, message) in enumerate(parts):
            if message is not None:
                raise AdarankError(f"process {rank} of {self.count}: {message}")
        return {key: value for part, _ in parts for key, value in part.items()}

    def _gather(self, value: T) -> list[T]:
        if self.count == 1:
            return [value]
        parts: list[object] = [None] * self.count
        dist.all_gather_object(parts, value)
        return cast("list[T]", parts)


@contextmanager
def started_by_torchrun() -> Iterator[Processes]:
    """Join the process group that `torchrun` or `accelerate launch` asks for, if either did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Processes.current()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield Processes.current()
    finally:
        dist.destroy_process_group()
