"""Ranks for a language model: predict, look, spend another budget, draw."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adarank_fast as ada


def main(trials: int = 5) -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    batches = [{"input_ids": torch.randint(512, (8, 32))} for _ in range(2)]

    cost = ada.estimate_cost(model, batches, "all-linear", trials, output="logits")
    print(f"{cost.modules} modules, {cost.probes} probes, about {cost.seconds:.1f} s")

    plan = ada.predict_ranks(
        model,
        batches,
        average_rank=8,
        target_modules="all-linear",
        output="logits",
        trials=trials,
        progress=False,
    )
    print(plan.table())

    # Half of the budget, from the same scores: nothing is probed again.
    small = plan.allocate(average_rank=4, rank_multiple=2)
    print(f"average rank 8: {plan.parameters:,} adapter parameters; 4: {small.parameters:,}")

    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder, "plan.json"))
        assert ada.RankPlan.load(Path(folder, "plan.json")).ranks == plan.ranks
        ada.plot_plan(plan, Path(folder, "plan.png"))


if __name__ == "__main__":
    main()
