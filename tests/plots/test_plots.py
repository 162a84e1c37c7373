import os
import re
import subprocess
import sys

import pytest

from adarank_fast.plan.rank_plan import RankPlan, Score
from adarank_fast.plots.plans import arrange, plot_disagreement, plot_plan, plot_ranks
from adarank_fast.plots.runs import plot_training
from adarank_fast.plots.style import line_style

BERT = [
    f"encoder.layer.{i}.attention.{part}"
    for i in range(6)
    for part in ("self.query", "self.key", "self.value", "output.dense")
]
LLAMA = [f"layers.{i}.mlp.{part}_proj" for i in range(30) for part in ("gate", "up", "down")]
T5 = [f"encoder.block.{i}.layer.0.SelfAttention.{x}" for i in range(4) for x in "qkvo"]
T5 += [
    f"decoder.block.{i}.layer.{j}.{kind}.{x}"
    for i in range(3)
    for j, kind in enumerate(("SelfAttention", "EncDecAttention"))
    for x in "qkvo"
]


def plan_for(names, scores=True):
    return RankPlan(
        ranks={name: i % 17 for i, name in enumerate(names)},
        sizes=dict.fromkeys(names, (64, 64)),
        scores={n: Score.from_trials([0.1 + i % 5, 0.2 + i % 5]) for i, n in enumerate(names)}
        if scores
        else {},
    )


def kinds(names):
    return {kind for _, kind in arrange(names).values()}


def test_layers_and_module_types():
    assert kinds(BERT) == {"query", "key", "value", "dense"}
    assert arrange(BERT)["encoder.layer.3.attention.self.query"] == (3, "query")
    assert kinds(T5) == {
        *(f"{tower}.SelfAttention.{x}" for tower in ("encoder", "decoder") for x in "qkvo"),
        *(f"EncDecAttention.{x}" for x in "qkvo"),
    }
    assert arrange(T5)["decoder.block.2.layer.1.EncDecAttention.k"] == (2, "EncDecAttention.k")


def test_module_types_that_end_alike_are_told_apart():
    names = ["l.0.attention.output.dense", "l.0.intermediate.dense", "l.0.output.dense"]
    assert arrange([*names, "pooler.dense"]) == {
        "l.0.attention.output.dense": (0, "attention.output.dense"),
        "l.0.intermediate.dense": (0, "intermediate.dense"),
        "l.0.output.dense": (0, "output.dense"),
        "pooler.dense": (None, "pooler.dense"),
    }
    assert kinds(["a.0.q", "b.0.q", "q"]) == {"a.q", "b.q", "q"}
    assert kinds(["a.b.0.q", "b.a.0.q"]) == {"a.b.q", "b.a.q"}


@pytest.mark.parametrize(
    ("names", "scores"),
    [(LLAMA, True), ([*BERT[:8], "pooler.dense"], True), (["q"], True), (BERT, False)],
)
def test_every_kind_of_plan_can_be_drawn(names, scores, tmp_path):
    plot_plan(plan_for(names, scores), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["plan.png"]


def test_the_picture_shows_the_plan(tmp_path):
    plot_plan(plan_for(T5), tmp_path / "plan.svg")
    plot_ranks(plan_for(BERT), tmp_path / "ranks.svg")
    plot_disagreement(plan_for(BERT), tmp_path / "disagreement.svg")
    text = (tmp_path / "plan.svg").read_text()  # matplotlib writes each string as a comment
    for label in (*kinds(T5), "16", "layer", "disagreement"):
        assert f"<!-- {label} -->" in text
    ranks = (tmp_path / "ranks.svg").read_text()
    assert all(f"<!-- {rank} -->" in ranks for rank in range(17))
    assert "<!-- query -->" in (tmp_path / "disagreement.svg").read_text()
    with pytest.raises(ValueError, match="no scores to plot"):
        plot_disagreement(plan_for(BERT, scores=False), tmp_path / "no.png")


def test_training_curves(tmp_path):
    curves = {"adarank": [(0, 1.0), (10, 0.5)], "uniform": [(0, 1.0), (10, 0.6)]}
    plot_training(curves, tmp_path / "loss.svg", "training loss")
    text = (tmp_path / "loss.svg").read_text()
    assert all(f"<!-- {label} -->" in text for label in ("adarank", "uniform", "training loss"))
    rates = {"uniform": [(0.001, 1.0), (0.002, 0.5), (0.004, 0.6)]}
    ticks = [0.001, 0.002, 0.004]
    plot_training(rates, tmp_path / "rates.svg", "loss", ticks=ticks, order=["adarank", "uniform"])
    text = (tmp_path / "rates.svg").read_text()
    assert re.findall("<!-- (0.*) -->", text)[:3] == ["0.001", "0.002", "0.004"]
    assert "#ff7f0e" in text and "#1f77b4" not in text  # the second colour, as of all arms
    with pytest.raises(ValueError, match="curves is empty"):
        plot_training({}, tmp_path / "loss.svg", "loss")


def test_lines_that_lie_on_each_other_are_told_apart():
    styles = [line_style(index) for index in range(40)]
    assert len({(one["color"], one["linestyle"]) for one in styles}) == 40
    for first, second in zip(styles[:4], styles[1:4], strict=False):
        assert first["linestyle"] != second["linestyle"] != "-"  # the one beneath shows in the gaps
        assert first["linewidth"] > second["linewidth"]


def test_bad_paths(tmp_path):
    with pytest.raises(ValueError, match=r"cannot draw .docx; use .png"):
        plot_plan(plan_for(BERT), tmp_path / "plan.docx")
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        plot_plan(plan_for(BERT), tmp_path / "no" / "plan.png")
    assert os.listdir(tmp_path) == []


def test_no_global_state(tmp_path):
    script = (
        "import sys; from adarank_fast.plots import style; assert 'matplotlib' not in sys.modules\n"
        "style.write(style.new_figure(3, 3), sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.png"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
