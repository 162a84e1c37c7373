import pytest

from tests.comparison.comparisons import run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A comparison of three arms: (its folder, its report)."""
    folder = tmp_path_factory.mktemp("report")
    made = run(work_dir=folder)
    made.save(folder)
    return folder, made
