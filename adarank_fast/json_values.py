"""Reads JSON files strictly, with a check of every value where it is used.

No torch here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from adarank_fast.errors import AdarankError, AdarankFileNotFoundError

MOST = 2**31 - 1  # of counts: torch, tokenizers and PEFT keep some of them in 32 bits
LARGEST = 1e300  # of magnitudes, so that sums of many stay finite
LONGEST = 80  # of a value in a message


def parse(text: str | bytes) -> object:
    """JSON as the standard has it: no key twice, no NaN, text that can be encoded.

    Raises:
        ValueError: one line that says what is wrong.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
        if "\\u" in text:  # a lone surrogate passes json.loads and fails wherever it is written
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {said(twice)} is there twice")
    return found


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def said(value: object) -> str:
    """A value as a message shows it: in JSON's notation, cut where it is long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


@dataclass(frozen=True)
class Value:
    """A value of a JSON file, with all that a message about it must name.

    Attributes:
        value: as `parse` returned it.
        file: what the file is called in a message.
        remedy: what to do where it is damaged.
        keys: the keys that lead to the value.
    """

    value: object
    file: str
    remedy: str
    keys: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str | os.PathLike[str], what: str, remedy: str) -> Value:
        """The content of a JSON file.

        Args:
            path: the file.
            what: it is, such as "plan".
            remedy: see `Value`.

        Raises:
            AdarankFileNotFoundError: there is no such file.
            AdarankError: it cannot be read, or is not JSON.
        """
        name = f"{what} {str(path)!r}"
        try:
            content = parse(Path(path).read_bytes())
        except FileNotFoundError:
            raise AdarankFileNotFoundError(
                f"there is no {what} file {str(path)!r}; {remedy}"
            ) from None
        except OSError as error:
            raise AdarankError(f"cannot read {name}: {error.strerror}") from error
        except ValueError as error:
            raise AdarankError(f"{name} is not a JSON file ({error}); {remedy}") from None
        return cls(content, name, remedy)

    def __getitem__(self, key: str) -> Value:
        """The value of a key.

        Raises:
            AdarankError: there is no such key, or nothing with keys.
        """
        found = self.mapping()
        if key not in found:
            raise self.damaged(f"no {key!r}", "has ")
        return self._at(key, found[key])

    def get(self, key: str) -> Value | None:
        """The value of a key; None if there is no such key, or its value is null."""
        found = self.mapping().get(key)
        return None if found is None else self._at(key, found)

    def items(self) -> Iterator[tuple[str, Value]]:
        """Key and value of each member. Raises `AdarankError` if it is no object."""
        return ((key, self._at(key, value)) for key, value in self.mapping().items())

    def mapping(self) -> dict[str, object]:
        """A copy of the object. Raises `AdarankError` if it is none."""
        return dict(self.value) if isinstance(self.value, dict) else self._refuse("no object")

    def list(self) -> Sequence[Value]:
        """The elements. Raises `AdarankError` if it is no list."""
        if not isinstance(self.value, list):
            self._refuse("no list")
        return [self._at(str(index), value) for index, value in enumerate(self.value)]

    def text(self) -> str:
        """The string. Raises `AdarankError` if it is none."""
        return self.value if isinstance(self.value, str) else self._refuse("no text")

    def truth(self) -> bool:
        """The Boolean. Raises `AdarankError` if it is none."""
        return (
            self.value if isinstance(self.value, bool) else self._refuse("neither true nor false")
        )

    def integer(self, least: int = 0, most: int = MOST) -> int:
        """An integer in [least, most], neither true nor 1.0. Raises `AdarankError` otherwise."""
        value = self.value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self._refuse(f"no integer from {least} to {most}")
        return value

    def number(self, least: float = 0.0, most: float = LARGEST) -> float:
        """A finite number."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._refuse(f"no number from {least:g} to {most:g}")
        whole = isinstance(value, int)
        if (whole and abs(value) > LARGEST) or not least <= value <= most:
            self._refuse(f"no number from {least:g} to {most:g}")
        assert math.isfinite(value)
        return float(value)

    def one_of(self, choices: Sequence[str]) -> str:
        """A string among `choices`. Raises `AdarankError` otherwise."""
        text = self.text()
        return text if text in choices else self._refuse(f"none of {', '.join(choices)}")

    def damaged(self, what: str, verb: str = "is ") -> AdarankError:
        """An error that says what is wrong with the value."""
        where = f"{'.'.join(self.keys)} " if self.keys else ""
        where = where if len(where) <= 2 * LONGEST else f"...{where[-2 * LONGEST :]}"
        return AdarankError(f"{self.file} is damaged: {where}{verb}{what}; {self.remedy}")

    def _refuse(self, what: str) -> NoReturn:
        raise self.damaged(f"{said(self.value)}, {what}")

    def _at(self, key: str, value: object) -> Value:
        return Value(value, self.file, self.remedy, (*self.keys, key))
