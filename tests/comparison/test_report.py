"""What a report says, of made-up figures and of a real comparison: no more than they hold."""

from __future__ import annotations

import html
import json
import re

import pytest
from rich.console import Console

from adarank_fast.comparison import findings, report
from adarank_fast.plan.rank_plan import RankPlan
from tests.comparison.comparisons import ARMS


def results_of(difference, items, seeds=3, metric="accuracy"):
    blank = {"diverged": {}, "rate_at_the_edge": False, "seeds_disagree": {}}
    return {
        "settings": {
            "metric": metric,
            "seeds": list(range(seeds)),
            "task": "classification",
            "greater_is_better": metric == "accuracy",
        },
        "baseline": "uniform",
        "items_are": metric,
        "arms": {"adarank": blank, "uniform": blank},
        "differences": {"adarank": {"seeds": difference, "items": items}},
    }


def span(mean, low, high, count=3, p_value=0.01):
    return {"mean": mean, "low": low, "high": high, "count": count, "p_value": p_value}


@pytest.mark.parametrize(
    "seeds, items, words",
    [
        (
            span(0.004, -0.01, 0.018),
            span(0.004, -0.01, 0.02, 900),
            "No evidence of a difference in accuracy between adarank and uniform.",
        ),
        (
            span(0.004, -0.01, 0.018),
            span(0.004, 0.001, 0.007, 900),
            "No evidence of a difference in accuracy between adarank and uniform: there is "
            "one on these items, but other seeds may not show it.",
        ),
        (
            span(0.02, 0.01, 0.03),
            span(0.02, 0.005, 0.035, 900),
            "adarank is better in accuracy than uniform, by more than chance explains.",
        ),
        (
            span(-0.02, -0.03, -0.01),
            span(-0.02, -0.035, -0.005, 900),
            "adarank is worse in accuracy than uniform, by more than chance explains.",
        ),
        (
            span(0.02, 0.01, 0.03),
            span(0.02, -0.005, 0.045, 900),
            "adarank is better in accuracy than uniform over seeds, on these items; other items "
            "may say otherwise.",
        ),
        (
            span(0.02, 0.01, 0.03),
            None,
            "adarank is better in accuracy than uniform, by more than chance over seeds; chance "
            "over items is not known.",
        ),
        (
            span(0.02, None, None, 1, None),
            span(0.02, 0.01, 0.03, 900),
            "More seeds are needed to tell adarank from uniform in accuracy.",
        ),
    ],
)
def test_reading_is_honest(seeds, items, words):
    claim, figures = findings.verdicts(results_of(seeds, items))[0]
    assert claim == words and figures.startswith("adarank minus uniform: ")
    assert findings.reading(results_of(seeds, items))[0] == f"{claim} {figures}"


def test_figures_behind_a_claim():
    results = results_of(span(0.004, -0.01, 0.018), span(0.004, -0.01, 0.02, 900))
    assert findings.verdicts(results)[0][1] == (
        "adarank minus uniform: +0.40 points, "
        "95% interval -1.00 to +1.80 points over 3 seeds "
        "(paired t test, p = 0.01); -1.00 to +2.00 points over 900 held-out items."
    )


def test_a_lower_perplexity_is_better():
    lower = span(-0.3, -0.4, -0.2), span(-0.02, -0.03, -0.01, 900)
    claim, figures = findings.verdicts(results_of(*lower, metric="perplexity"))[0]
    assert claim.startswith("adarank is better in perplexity than uniform")
    assert "-0.3 (below 0 is better), 95% interval -0.4 to -0.2" in figures


def test_runs_that_end_worse_than_the_sweep_say_nothing_of_ranks():
    results = results_of(span(0.1, 0.05, 0.15), span(0.1, 0.08, 0.12, 900))
    results["sweep"] = [
        {"arm": arm, "learning_rate": 8e-3, "value": 0.8, "loss": 0.5, "diverged": None}
        for arm in ("adarank", "uniform")
    ]

    def run(arm, seed, value, loss):
        shared = {"arm": arm, "seed": seed, "learning_rate": 8e-3, "diverged": None}
        return shared | {"value": value, "loss": loss}

    steady = [run("adarank", seed, 0.82, 0.9) for seed in range(3)]  # surer of its errors, no worse
    results["runs"] = steady + [run("uniform", seed, 0.79, 0.59) for seed in range(3)]
    assert findings.verdicts(results)[0][0].startswith("adarank is better")
    results["runs"] = [*steady, run("uniform", 0, 0.81, 0.4), run("uniform", 2, 0.3, 2.0)]
    assert findings.unsteady(results) == {"uniform": [2]}
    assert findings.verdicts(results)[0][0] == (
        "Nothing can be said of adarank and uniform: runs of uniform became unstable at the "
        "learning rate that the sweep chose."
    )
    assert any(
        line.startswith("1 of 3 runs of uniform became unstable")
        for line in findings.remarks(results)
    )


def test_files(finished):
    folder, made = finished
    assert json.loads((folder / "results.json").read_text()) == made.results
    text = (folder / "report.md").read_text()
    page = (folder / "report.html").read_text()
    for name in ("metric", "differences", "training", "rates", "ranks-adarank"):
        assert f"({name}.png)" in text
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == text.count(".png)")
    assert 'src="data:' in page and "http" not in page
    for arm in ARMS:
        assert RankPlan.load(folder / "plans" / f"{arm}.json").ranks == made.plans[arm].ranks
        assert f"| {arm} |" in text and f"<td>{arm}</td>" in page and arm in made.table()
    unwrapped = " ".join(made.table().split())
    for line in findings.remarks(made.results):
        assert f"- {line}" in text and line in unwrapped
    for claim, figures in findings.verdicts(made.results):
        assert f"**{claim}** {figures}" in text and f"{claim} {figures}" in unwrapped


def test_any_name_and_a_narrow_terminal(finished, tmp_path, capsys):
    _, made = finished
    text = json.dumps(made.results).replace('"reversed"', '"<b>*a plan* (2)|"')
    plans = dict(zip(("adarank", "uniform", "<b>*a plan* (2)|"), made.plans.values(), strict=True))
    odd = report.Comparison(json.loads(text), plans)
    odd.results["settings"]["title"] = "<script>alert(1)</script>"
    odd.save(tmp_path)
    page, words = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "<script>" not in page and "<b>" not in page
    assert "<td>&lt;b&gt;*a plan* (2)|</td>" in page
    assert "| \\<b>\\*a plan\\* (2)\\| |" in words
    assert "(ranks-%3Cb%3E%2Aa%20plan%2A%20%282%29%7C.png)" in words
    console = Console(width=80, color_system=None)
    for table in report.rich_tables(odd.results):
        console.print(table)
    shown = f"{capsys.readouterr().out}\n{odd}"
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80


def test_a_comparison_in_a_notebook(finished):
    _, made = finished
    assert repr(made).startswith("Comparison('encoder, classification': adarank, uniform, reversed")
    assert made._repr_html_() == f"<pre>{html.escape(made.table())}</pre>"
    pytest.importorskip("pandas")
    frame = made.to_frame()
    assert list(frame.index) == list(ARMS) and set(frame["parameters"]) == {1024}
    assert frame["minus_uniform"].notna().to_dict() == {arm: arm != "uniform" for arm in ARMS}
    arm = made.results["arms"]["adarank"]["value"]
    assert frame.loc["adarank", ["accuracy", "parameters"]].tolist() == [arm["mean"], 1024]


def test_a_page_for_narrow_screens(finished):
    """What is wider than a phone scrolls inside of its own box, so that the page does not."""
    page = (finished[0] / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert ".wide { overflow-x: auto }" in page and "img { display: block; max-width: 100%" in page
    parts = re.findall(r'(<div class="wide">)?<(table|img)[^>]*?(min-width)?[^>]*>', page)
    assert parts and all(box for box, kind, least in parts if kind == "table" or least)


def test_claims_come_first(finished):
    folder, made = finished
    page = (folder / "report.html").read_text()
    positions = [
        page.index(f"<strong>{html.escape(claim)}</strong>")
        for claim, _ in findings.verdicts(made.results)
    ]
    assert positions == sorted(positions) and max(positions) < page.index("<table>")
    titles = re.findall("<h2>(.*)</h2>", page)
    assert titles == [
        *("Held-out accuracy, mean over seeds", "Cost", "Ranks", "Training"),
        *("Learning rates", "Runs", "How"),
    ]
