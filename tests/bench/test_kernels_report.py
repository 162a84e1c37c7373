"""docs/kernels.md is of the figures in bench/results, and these of the kernels that there are."""

from __future__ import annotations

from bench import kernels_report
from bench.kernel_cases import cases


def test_the_committed_page_is_of_the_committed_figures() -> None:
    rows = kernels_report.figures()
    assert kernels_report.PAGE.read_text() == kernels_report.page(rows)
    found = {(row["target"], row["kernel"], row["config"], row["dtype"]) for row in rows}
    assert found == {
        (target, case.kernel, case.config_on(target), case.dtype)
        for case in cases()
        for target in kernels_report.TARGETS
    }
    assert not any(int(row["spill_store_bytes"]) for row in rows)
    strict = [row["broken"] for row in rows if row["target"] in kernels_report.STRICT]
    assert not any(strict)
