"""Projections: counts worked out by hand, and the word in every title."""

from __future__ import annotations

import pytest

from bench.counts import (
    PASSES,
    SHAPES,
    Cost,
    Shape,
    expand,
    pass_elements,
    product,
)
from bench.roofline import (
    CARDS,
    FORMS,
    Card,
    adapter_cost,
    base_cost,
    common_costs,
    project,
    projections,
)

QKV = (4096, (4096, 1024, 1024))


def test_counts_of_one_group() -> None:
    # two modules of 10 -> 30 and 10 -> 20: M X = 20, X = 10, Y = 50 elements a token
    assert pass_elements((1, 0, 6), 10, (30, 20)) == 20 + 6 * 50
    assert pass_elements((0, 3, 2), 10, (30, 20)) == 30 + 2 * 50
    assert product(2, 3, 5) == Cost(2 * (10 + 15 + 6), 60)
    assert expand(7, 2, (3, 5)) == Cost(2 * (7 * (2 * 8 + 2 * 2) + 8 * 2), 2 * 7 * 2 * 8)
    assert Cost(100.0, 30.0).seconds(10.0, 10.0) == 10.0
    assert Cost(100.0, 30.0).seconds(100.0, 10.0) == 3.0


@pytest.mark.parametrize(
    ("form", "passes"),  # in X, of q/k/v with Y = 1.5 X, from the table of docs/kernels.md
    [("PEFT", 33.0), ("Unsloth", 22.5), ("LoRAFusion", 7.5), ("ours", 10.0)],
)
def test_bytes_of_llamas_attention(form: str, passes: float) -> None:
    tokens, (width, outs) = 1000, QKV
    cost = adapter_cost(form, tokens, width, outs, 8)
    assert cost.bytes == 2 * tokens * (passes * width + 6 * 3 * 8)
    assert cost.flops == 6 * tokens * 8 * (3 * 4096 + 6144)


def test_a_projection_worked_out_by_hand() -> None:
    card = Card(bandwidth=1e3 / 0.9, rate=1e6 / 0.7)  # 1,000 bytes and 1e6 FLOPs a second reached
    shape = Shape(10, 10, 5, 20, 5, True, 2, 100)
    found = project(card, shape, tokens=4, rank=2)
    base = 4 * 4 * 10 * 20 / 1e6
    assert found["q/k/v"]["base"] == pytest.approx(base)
    # LoRAFusion: 2 M X + Y = 60 + 20 elements a token, and 6 passes over 3 ranks of 2
    assert found["q/k/v"]["LoRAFusion"] == pytest.approx(base + 2 * 4 * (80 + 36) / 1e3)
    layers = sum(found[group]["PEFT"] for group in ("q/k/v", "o", "gate/up", "down"))
    attention = 2 * 7 * 4 * 4 * 10 / 1e6
    elementwise = 2 * 2 * 4 * (16 * 10 + 4 * 15 + 8 * 20) / 1e3
    head, loss = 4 * 4 * 10 * 100 / 1e6, 2 * 4 * 4 * 100 / 1e3
    expected = 2 * layers + attention + elementwise + head + loss
    assert found["step"]["PEFT"] == pytest.approx(expected)
    assert len(common_costs(shape, 4)) == 4 and base_cost(4, 10, (20,)).flops == 800 * 4


def test_no_form_is_below_the_base_and_none_of_ours_above_peft() -> None:
    for card in CARDS.values():
        for rank in (8, 64):
            for projected in project(card, SHAPES["Qwen3-0.6B"], 4096, rank).values():
                assert all(projected[form] > projected["base"] for form in FORMS)
                assert projected["floor"] <= min(projected[form] for form in FORMS)
                assert projected["ours"] < projected["PEFT"]
    assert set(FORMS.values()) == set(PASSES)


def test_every_table_says_projection_and_has_its_figures() -> None:
    printed = projections()
    assert printed.count("Projection, not measured: ") == printed.count("| projection of |") == 12
    assert "Formula" in printed and "70%" in printed and "90%" in printed
    *_, last = printed.strip().splitlines()
    step = project(CARDS["H100"], SHAPES["Qwen3-0.6B"], 8192, 64)["step"]
    over = f"{step['floor'] * 1e3:.3g} ({step['floor'] / step['base'] - 1:+.0%}) |"
    assert last.startswith(f"| step | {step['base'] * 1e3:.3g} |") and last.endswith(over)
