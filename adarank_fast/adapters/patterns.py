"""Regular expressions of an adapter's configuration, tried where they can be stopped.

Python's `re` may take for ever over a few characters, and PEFT evaluates what a configuration says
over every module. So that a stranger's file cannot hang the process, patterns are evaluated first
in another one with a limit on its time: whatever ends there ends here too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

from peft import LoraConfig

from adarank_fast.errors import AdarankError
from adarank_fast.json_values import said

SECONDS = 2.0  # of processor time, for all patterns of a configuration
A_MATCH = 20e-6  # seconds more for each pattern and name; one match usually takes 1e-6
PLAIN = re.compile(r"[\w\\.^$/ -]*", re.ASCII)  # nothing here makes `re` try twice

CHILD = """
import json, re, signal, sys, warnings
warnings.simplefilter("ignore")
patterns, names, seconds = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_PROF, seconds)
for pattern in patterns:
    print(json.dumps(pattern), flush=True)
    compiled = re.compile(pattern[1])
    for name in names:
        getattr(compiled, pattern[2])(name)
"""


@contextmanager
def keys_of_experts() -> Iterator[None]:
    """PEFT looks for rank_pattern's keys among modules only, and warns of those of parameters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not")
        yield


def check_patterns(config: LoraConfig, names: Sequence[str]) -> None:
    """Check that every pattern of the configuration is valid, and fast on these module names.

    Raises:
        AdarankError: which does not.
    """
    patterns = tuple((field, pattern, how) for field, pattern, how in _patterns(config))
    for field, pattern, _ in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdarankError(
                f"the adapter's {field} {said(pattern)} is no regular expression ({error}); "
                "correct its adapter_config.json"
            ) from None
    doubtful = tuple(one for one in patterns if not PLAIN.fullmatch(_own(one[1])))
    if doubtful and (slow := _slow(doubtful, tuple(names))):
        raise AdarankError(
            f"the adapter's {slow[0]} {said(slow[1])} takes too long to match module names; "
            "correct its adapter_config.json"
        )


def _patterns(config: LoraConfig) -> Iterator[tuple[str, str, str]]:
    """(field, pattern, method of `re.Pattern`), as PEFT makes them of the configuration."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(config, field), str):
            yield field, value, "fullmatch"
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field) or {}:
            yield field, rf"(.*\.)?({key})$", "match"
    for name in config.modules_to_save or ():
        yield "modules_to_save", rf"(^|.*\.){name}($|\..*)", "match"
    layers: str | Iterable[str] = config.layers_pattern or ()
    for key in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", rf"(?:^|.*?\.){key}\.(?P<idx>\d+)\.", "match"


def _own(pattern: str) -> str:
    """What the configuration itself says of a pattern."""
    for before, after in ((r"(.*\.)?(", ")$"), (r"(^|.*\.)", r"($|\..*)")):
        if pattern.startswith(before) and pattern.endswith(after):
            return pattern[len(before) : -len(after)]
    return pattern


@lru_cache(maxsize=64)
def _slow(
    patterns: tuple[tuple[str, str, str], ...], names: tuple[str, ...]
) -> tuple[str, str] | None:
    """(field, pattern) of the first pattern that is not done in time."""
    seconds = SECONDS + A_MATCH * len(patterns) * len(names)
    given = json.dumps([patterns, names, seconds])
    command = [sys.executable, "-I", "-S", "-c", CHILD]
    try:
        # the wall clock only stops what has no timer: a busy machine is no fault of the pattern
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=30 * seconds
        )
        said_so_far, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as error:
        output = error.stdout or ""
        said_so_far, failed = output if isinstance(output, str) else output.decode(), True
    if not failed:
        return None
    lines = said_so_far.splitlines()
    field, pattern, _ = json.loads(lines[-1]) if lines else patterns[0]
    return field, pattern
