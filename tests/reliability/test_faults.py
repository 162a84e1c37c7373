"""Whatever ends a public function, and where: the model is as it was, the next call is right.

FAULTS=all fails at every call, FAULTS=100 at a hundred of them, evenly spread.
"""

import inspect
from random import Random

import pytest

import adarank_fast as ada
from tests.reliability import faults
from tests.reliability.fault_cases import CASES


@pytest.mark.parametrize("error", faults.ERRORS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_fault_at_any_call(case, error):
    calls, ended = faults.check(case, error)
    print(f"{calls} calls, {ended} ended")
    assert ended > 0


def test_every_public_function_of_a_model_has_a_case():
    functions = {n: getattr(ada, n) for n in ada.__all__ if inspect.isfunction(getattr(ada, n))}
    first = {name: next(iter(inspect.signature(f).parameters)) for name, f in functions.items()}
    of_models = {
        n for n, one in first.items() if one in ("model", "models", "peft_model", "module")
    }
    of_models -= {"compare"}  # makes its models itself
    assert len(of_models) > 10 and of_models <= {name.split()[0] for name in CASES}


def test_calls_of_every_site():
    first, more = faults.of_sites(list("abcbcccc"), Random(0))
    assert first == [1, 2, 3] and more[:2] == [4, 8] and 3 < more[2] < 8 and len(more) == 3


def test_a_whole_run_fails_at_every_site_and_ends():
    counts = faults.soak({"graph_report": CASES["graph_report"]}, 60, most=0)
    assert not counts["faults"], counts["faults"]
    sites = counts["all call sites"]
    assert 0 < sites == counts["call sites"] <= counts["raised"] / 2 <= counts["calls"]
    assert faults.soak({"graph_report": CASES["graph_report"]}, 0)["raised"] == 0
