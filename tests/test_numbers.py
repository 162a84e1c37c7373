"""Every number of every command and public function is in its range, or refused with one line."""

from __future__ import annotations

import inspect
import math

import numpy
import pytest
from torch import nn
from typer.models import OptionInfo

import adarank_fast as ada
from adarank_fast.cli.main import app
from adarank_fast.options import RANGES, check_number
from adarank_fast.training.trainer import Recipe

ODD = (
    *(math.nan, math.inf, -math.inf, -1, -(2**31), 2**32, 2**64, 10**400, 1e308, True, "8", "x"),
    *(numpy.float64("nan"), numpy.int64(-1), numpy.bool_(True), [8], {}, 1j),
)
COMMANDS = {one.callback.__name__: one.callback for one in app.registered_commands}
PARAMETERS = {
    name: list(inspect.signature(command).parameters.values()) for name, command in COMMANDS.items()
}
NUMBERS = [
    (name, f"--{one.name.replace('_', '-')}")
    for name, parameters in PARAMETERS.items()
    for one in parameters
    if one.annotation.__origin__ in (int, float, int | None, float | None)
]


@pytest.mark.parametrize(("command", "flag"), NUMBERS)
def test_numbers_of_commands(adarank, command, flag):
    required = []
    for one in PARAMETERS[command]:
        if one.default is inspect.Parameter.empty:
            option = isinstance(one.annotation.__metadata__[0], OptionInfo)
            required += [f"--{one.name}=x"] if option and "output" not in one.name else []
            required += ["-o=x"] if option and "output" in one.name else []
            required += [] if option else ["x"]
    for value in ("nan", "inf", "-inf", "-1", "4294967296", "1" * 400, "1e308", "True", "", "0x1"):
        most = RANGES[flag.lstrip("-").replace("-", "_")].most
        if value == "4294967296" and most > 2**32:
            continue
        status, out, err = adarank(command, *required, f"{flag}={value}")
        assert (status, out, err.count("\n")) == (2, "", 1), (value, err)
        assert flag in err, (value, err)


def refused(name, value):
    try:
        return value not in RANGES[name]
    except TypeError:
        return True


def calls():
    """(name of a number, a function of its value that must not get further than its check)."""
    probing = ("average_rank", "budget_parameters", "min_rank", "max_rank", "rank_multiple")
    for name in (*probing, "trials", "seed", "max_seconds", "max_memory"):
        yield name, lambda value, name=name: ada.predict_ranks(None, [], **{name: value})
    for name in probing:
        yield name, lambda value, name=name: ada.allocate_ranks({"a": 1.0}, **{name: value})
    for name in ("epochs", "batch_size", "learning_rate", "seed", "max_steps"):
        yield name, lambda value, name=name: Recipe(**{name: value})
    for name in ("epochs", "batch_size", "max_steps", "max_length", "trials", "scaling"):
        yield name, lambda value, name=name: ada.compare("x", "x", **{name: value})
    yield "seeds", lambda value: ada.compare("x", "x", seeds=value)
    for name in ("minimum", "maximum"):
        yield name, lambda value, name=name: ada.AdaptiveTrials(**{name: value})
    yield "rank", lambda value: ada.RankPlan.uniform(nn.Linear(2, 2), value)
    yield "rank", lambda value: ada.export_uniform(None, "/nowhere/x", value)
    yield "trials", lambda value: ada.estimate_cost(None, [], trials=value)
    for name in ("trial", "seed"):
        yield name, lambda v, name=name: ada.perturbation(None, "a", **{"trial": 0, name: v})
    yield "scaling", lambda value: ada.RankPlan({"a": 1}, {"a": (2, 2)}).to_lora_config(value)


def test_numbers_of_functions():
    for name, call in calls():
        for value in ODD:
            if not refused(name, value) or name == "seeds" and value == [8]:
                continue
            with pytest.raises(ada.AdarankError) as raised:
                call(value)
            said = str(raised.value)
            assert name in said and said.isprintable() and len(said) < 400, (name, value, said)


def test_numbers_of_numpy_are_numbers():
    budget = ada.Budget(numpy.float32(2.5), max_rank=numpy.int64(8))
    assert budget == ada.Budget(2.5, max_rank=8)
    assert type(budget.average_rank) is float and type(budget.max_rank) is int
    assert type(check_number("seed", numpy.uint8(3))) is int
    assert ada.Probe(seed=numpy.int32(7)).seed == 7
