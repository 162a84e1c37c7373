"""Modules before all that is perturbed: embeddings, which answer from a record in every replay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from adarank_fast.agreement import is_same, is_twice
from adarank_fast.trace import Trace


def find_entrances(root: nn.Module, inner: set[nn.Module]) -> Iterator[nn.Module]:
    """Topmost modules with embeddings and more (a norm, say), but nothing `inner`."""
    for child in root.children():
        inside = set(child.modules())
        embeds = any(isinstance(module, nn.Embedding) for module in inside)
        if embeds and len(inside) > 1:
            if inside & inner:
                yield from find_entrances(child, inner)
            else:
                yield child


def repeating(
    entrances: Mapping[nn.Module, Any], single: Trace, double: Trace
) -> dict[nn.Module, list[bool] | None]:
    """Of those, the ones whose outputs repeat in a folded batch or stay as they are; which do."""
    found: dict[nn.Module, list[bool] | None] = {}
    for module in entrances:
        both = [trace.entered.get(module, []) for trace in (double, single)]
        changeable = module in single.changeable or module in double.changeable
        if changeable or not both[1] or len(both[0]) != len(both[1]):
            continue
        pairs = list(zip(*both, strict=True))
        repeats = [is_twice(two, one) for two, one in pairs]
        if all(twice or is_same(*pair) for twice, pair in zip(repeats, pairs, strict=True)):
            found[module] = repeats
    return found
