"""Short versions of what `make soak` tries for long, its checks of itself, and its page."""

from __future__ import annotations

import json
import mmap

import pytest
import torch
from torch import nn

from bench.reliability_page import ARMS, PAGE, page
from tests.bench.test_benchmarks_page import HERE, cells
from tests.reliability import growth, sameness, serving, soak
from tests.reliability.sameness import Setting


def test_threads_that_serve_one_model_from_its_first_request():
    counts = serving.soak(60, seed=1, most=2)
    assert not counts["faults"], counts["faults"]
    assert counts["requests"] == 2 * serving.THREADS * serving.REQUESTS


def test_nothing_grows():
    counts = growth.soak(240, seed=1, steps=48, predictions=16)
    odd = [fault for fault in counts["faults"] if "resident" not in fault]  # still warming up
    assert not odd, odd
    assert counts["training steps"] == 48 and counts["predictions"] == 16


LEAK = 1 << 18  # bytes of a step


class Leaking:
    """Keeps a hook and a tensor of every step."""

    def __init__(self, random):
        self.everything, self.kept = nn.Linear(2, 2), []

    def step(self):
        self.everything.register_forward_hook(lambda *_: None)
        self.kept.append(torch.ones(1))
        self.kept.append(mmap.mmap(-1, LEAK))  # no memory that the process has to spare
        self.kept[-1].write(b"x" * LEAK)


def test_growth_is_found():
    count, faults = growth.watch(Leaking, 60, 0, 64)
    assert count == 64
    assert {fault.partition(":")[0] for fault in faults} == {"resident bytes", "hooks", "tensors"}


@pytest.fixture(scope="module")
def found():
    """The same work here and in a fresh process."""
    setting, threads = Setting(kinds=("bert", "deberta")), torch.get_num_threads()
    try:
        return sameness.work(setting), sameness.in_a_process(setting)
    finally:
        torch.set_num_threads(threads)


def test_fresh_processes_give_the_same_bits(found):
    assert sameness.same_bits(*found) == []
    assert len(found[0]["bits"]) == 3  # DeBERTa is not trained


def test_other_bits_scores_and_ranks_are_found(found):
    changed = json.loads(json.dumps(found[0]))
    changed["bits"]["bert: scores"] = "0"
    scores, ranks = changed["scores"]["bert"], changed["ranks"]["deberta"]
    scores[next(iter(scores))] += 2e-6
    ranks[min(ranks, key=ranks.get)] += 3
    ranks[max(ranks, key=ranks.get)] -= 3
    assert sameness.same_bits(found[0], changed) == ["bert: scores: other bits"]
    odd = sameness.same_plan(found[0], changed)
    assert [line.partition(":")[0] for line in odd] == ["bert", "deberta"]


def test_an_arm_that_fails_is_a_fault(tmp_path, monkeypatch):
    """Its process ends without a result; its last words are kept."""
    running = soak.Running("threads", 0.0, 0, True, tmp_path)
    running.end()
    row = running.row()
    assert row["faults"] == 1 and "no result" in row["shown"][0]


def row(faults=0, **counts):
    shown = [f"fault {number}" for number in range(faults)]
    counted = {"counts": counts, "faults": faults, "shown": shown}
    return counted | {"minutes": 1.25, "seed": 7, "machine": HERE}


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        (None, row(kills=1), True),
        (row(steps=9), row(kills=1), True),  # counted otherwise
        (row(kills=9), row(kills=8), False),
        (row(kills=9), row(kills=9), True),
        (row(kills=9), row(1, kills=1), True),
        (row(1, kills=9), row(kills=1), True),
    ],
)
def test_the_largest_run_without_a_fault_is_kept(old, new, kept):
    assert soak.is_kept("kills", old, new) is kept


def test_the_page(tmp_path):
    rows = {"kills": row(1, kills=1234, resumed=5), "growth": row(1)}
    rows["disk"] = row(**{"disk faults": 7, "all disk faults": 1000})
    (tmp_path / "reliability.json").write_text(json.dumps(rows))
    text = page(tmp_path)
    assert cells(text, "Kills")[1:] == ["1,234 kills", "200", "**1**", "1.2", "2026-01-02"]
    assert "kills: 1,234; resumed: 5. Seed 7." in text and "fault 0" in text
    assert cells(text, "Growth")[1:4] == ["-", "20,000", "**1**"]
    assert cells(text, "Full and read-only disks")[1] == "7 of 1,000 disk faults"
    assert text.count("not run yet") == len(ARMS) - 3


def test_every_arm_has_its_words():
    assert soak.SOAKS.keys() == ARMS.keys()
    assert sum(arm.share for arm in soak.SOAKS.values()) == pytest.approx(1)


def test_the_committed_page_is_of_the_committed_results():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make reliability-page`"
