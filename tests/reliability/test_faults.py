"""Whatever ends a public function, and where: the model is as it was, the next call is right.

FAULTS=all fails at every call, FAULTS=100 at a hundred of them, evenly spread.
"""

import pytest

from tests.reliability import faults
from tests.reliability.fault_cases import CASES


@pytest.mark.parametrize("error", faults.ERRORS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_fault_at_any_call(case, error):
    calls, ended = faults.check(case, error)
    print(f"{calls} calls, {ended} ended")
    assert ended > 0
