"""Files as strangers make them: valid ones, changed at random in structure and in bytes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

DEEP = "#deep#"  # becomes brackets by the thousand
BOMBS = ("(a+)+$", "(.*)*(.*)*x", "^(([a-z])+.)+[A-Z]([a-z])+$", "(\\w|\\w\\w)+!")
ODD_TEXTS = (
    *("", " ", "\n", "q\n", "\x00", "$", "a$b", "é", "\ud800", "\udfff", "[", "(", "*", "+", "\\"),
    *("a/b", "../..", ".", "..", "a..b", "nan", "true", "default", "None", "x" * 5000, "\u2028"),
    *BOMBS,
)
ODD_NUMBERS = (
    *(0, -0.0, -1, 1, 2, 3, 1.5, 0.1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(1e308, -1e308, 5e-324, 1e-300, math.nan, math.inf, -math.inf),
)
ODD_TREES = ([], {}, [[]], [{}], {"": None}, [None], [1, 2, 3], {"a": {"a": {}}}, DEEP)
ODD = (None, True, False, *ODD_TEXTS, *ODD_NUMBERS, *ODD_TREES)
BYTES = (b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b",", b"{", b"]", b"\\ud800", b"e9")


def change_bytes(random: Random, content: bytes) -> bytes:
    """One to four edits: a flipped bit, a cut, a copy, something odd put in."""
    for _ in range(random.randint(1, 4)):
        start = random.randint(0, len(content))
        end = min(start + random.choice((0, 1, 1, 2, 8, 64, 512)), len(content))
        kind = random.randint(0, 5)
        if kind == 0 and start < len(content):
            flipped = content[start] ^ (1 << random.randint(0, 7))
            content = content[:start] + bytes([flipped]) + content[start + 1 :]
        elif kind == 1:
            content = content[:start] + content[end:]
        elif kind == 2:
            content = content[:end] + content[start:]
        elif kind == 3:
            content = content[:start] + random.choice(BYTES) + content[start:]
        elif kind == 4:
            content = content[:start] + random.choice(BYTES) + content[end:]
        elif random.randint(0, 9) == 0:
            content = content[:start]
    return content


def change_json(random: Random, content: bytes) -> bytes:
    """One to three edits of the tree."""
    tree = json.loads(content)
    for _ in range(random.randint(1, 3)):
        tree = _change_tree(random, tree)
    text = json.dumps(tree, ensure_ascii=random.randint(0, 1) == 0)
    text = text.replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000)
    if random.randint(0, 19) == 0:  # a key twice
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    return text.encode("utf-8", "surrogatepass")


def _change_tree(random: Random, tree: Any) -> Any:
    if not isinstance(tree, (dict, list)) or not tree or random.randint(0, 30) == 0:
        return _change_leaf(random, tree)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = random.choice(keys)
    if random.randint(0, 2):
        tree[key] = _change_tree(random, tree[key])
        return tree
    kind = random.randint(0, 5)
    if kind == 0:
        del tree[key]
    elif kind == 1:
        tree[key] = _change_leaf(random, tree[key])
    elif kind == 2 and isinstance(tree, dict):
        tree[random.choice(ODD_TEXTS)] = tree.pop(key)
    elif kind == 3 and isinstance(tree, dict):
        return list(tree.values())
    elif kind == 4 and isinstance(tree, list):
        tree.insert(key, deepcopy(random.choice(ODD)))
    else:
        other = random.choice(keys)
        tree[key], tree[other] = tree[other], tree[key]
    return tree


def _change_leaf(random: Random, leaf: Any) -> Any:
    kind = random.randint(0, 7)
    if kind == 0:
        return [leaf]
    if kind == 1:
        return {"a": leaf}
    if kind == 2:
        return str(leaf)
    if kind == 3 and isinstance(leaf, str):
        return leaf + random.choice(ODD_TEXTS)
    if kind == 3 and isinstance(leaf, (int, float)) and abs(leaf) < 1e300:
        return leaf * random.choice((-1, 0.5, 2, 10**6))
    return deepcopy(random.choice(ODD))


def change_lines(random: Random, content: bytes) -> bytes:
    """A file of a JSON value a line: one line changed, left out, or there twice."""
    lines = content.split(b"\n")
    index = random.randint(0, len(lines) - 1)
    kind = random.randint(0, 4)
    if kind == 0:
        del lines[index]
    elif kind == 1:
        lines.insert(index, random.choice(lines))
    elif lines[index]:
        lines[index] = change_json(random, lines[index])
    return b"\n".join(lines)


SAME_WIDTH = {"F32": ("I32", "U32", "F32"), "F16": ("BF16", "I16", "F16")}


def change_tensors(random: Random, content: bytes) -> bytes:
    """A safetensors file: its header changed, or the type or the shape of a tensor, or values."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = random.randint(0, 3)
    if kind == 0:
        header = change_json(random, header)
    elif kind == 3:
        at = 4 * random.randint(0, len(data) // 4 - 1)
        value = random.choice((math.nan, math.inf, -math.inf, 3e38, 0.0))
        data = data[:at] + struct.pack("<f", value) + data[at + 4 :]
    else:
        tree = json.loads(header)
        entry = tree[random.choice([key for key in tree if key != "__metadata__"])]
        if kind == 1:
            entry["dtype"] = random.choice(SAME_WIDTH.get(entry["dtype"], ("F32",)))
        else:
            size = math.prod(entry["shape"])
            entry["shape"] = random.choice((entry["shape"][::-1], [size], [1, size], [0, size]))
        header = json.dumps(tree).encode()
    length = len(header) if random.randint(0, 9) else random.choice((0, 1, 2**40, 2**63, 7))
    return struct.pack("<Q", length) + header + data


Change = Callable[[Random, bytes], bytes]


def change(random: Random, content: bytes, structure: Change | None) -> bytes:
    """The content of a file, changed by `structure` or in its bytes."""
    if structure is None or random.randint(0, 2) == 0:
        return change_bytes(random, content)
    return structure(random, content)
