"""Every architecture of the table passes every step; `make compatibility` writes it down."""

import pytest

from adarank_fast.demo.assets import AssetError
from tests.conformance.architectures import ARCHITECTURES
from tests.conformance.pretrained import PRETRAINED
from tests.conformance.steps import STEPS, Subject, slow_path

ROWS = {**ARCHITECTURES, "MiniLM": PRETRAINED["MiniLM"]}


@pytest.fixture(scope="module", params=ROWS, ids=str)
def subject(request):
    try:
        return Subject(ROWS[request.param])
    except AssetError as error:
        pytest.skip(f"no package index to get the model from: {error}")


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_step(subject, step):
    with slow_path():
        assert STEPS[step](subject)
