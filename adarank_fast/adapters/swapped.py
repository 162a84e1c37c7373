"""Modules whose class was swapped for a subclass: shown, copied and pickled as what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from copyreg import _reconstructor  # type: ignore[attr-defined]
from typing import ClassVar, SupportsIndex

from torch import nn

HIDDEN = "_adarank"  # all such attributes begin so


class Swapped:
    """Mixed in before a module's class.

    Attributes:
        HIDDEN: the attribute that came with the swap; pickles leave it out.
        PLAIN: of the mixin: subclass -> the class that it stands for.
    """

    HIDDEN: ClassVar[str]
    PLAIN: ClassVar[dict[type, type]]

    @classmethod
    def plain_class(cls) -> type:
        """The class before all swaps, or what something else (`fully_shard`) made of it."""
        plain: type = cls
        while plain in getattr(plain, "PLAIN", {}):
            plain = plain.PLAIN[plain]  # type: ignore[attr-defined]
        return plain

    def _get_name(self) -> str:
        return self.plain_class().__name__

    def __copy__(self) -> object:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        """Pickled as the plain class, so that loading does not need this package; copied as is.

        `__deepcopy__` would not do: PEFT's wrappers hand it on as if it were their own.
        """
        hidden = {vars(cls).get("HIDDEN") for cls in type(self).__mro__}  # a block may be fused too
        state = {key: value for key, value in self.__dict__.items() if key not in hidden}
        kind = _Either(type(self), self.plain_class())
        return _reconstructor, (kind, object, None), _Either(self.__dict__, state)


class _Either:
    """One thing for `copy.deepcopy`, another for pickle."""

    def __init__(self, copied: object, pickled: object) -> None:
        self.copied, self.pickled = copied, pickled

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        return copy.deepcopy(self.copied, memo)

    def __reduce__(self) -> tuple[object, ...]:
        return copy.copy, (self.pickled,)


def put_back(model: nn.Module) -> Callable[[], None]:
    """What gives every module its class of now again, and the attributes that came with it."""
    before = [(module, type(module), _hidden(module)) for module in model.modules()]

    def undo() -> None:
        for module, kind, hidden in before:
            if type(module) is not kind:
                module.__class__ = kind
            for name in _hidden(module).keys() - hidden.keys():
                module.__dict__.pop(name, None)
            module.__dict__.update(hidden)

    return undo


def _hidden(module: nn.Module) -> dict[str, object]:
    return {key: value for key, value in vars(module).items() if key.startswith(HIDDEN)}
