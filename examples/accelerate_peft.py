"""One line for a PEFT model that you have: the same numbers, and a step's time before and after."""

from __future__ import annotations

import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import adarank_fast as ada


def main(steps: int = 10) -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    batch = {"input_ids": torch.randint(512, (4, 128))}

    def step() -> torch.Tensor:
        peft_model.zero_grad()
        loss = peft_model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        return loss.detach()

    def seconds() -> float:
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    plain, before = step(), seconds()
    ada.accelerate(peft_model, example=batch)  # the line
    fused, after = step(), seconds()

    torch.testing.assert_close(fused, plain)
    print(ada.fusion_report(peft_model))
    print(f"median step: {before * 1e3:.0f} ms with PEFT, {after * 1e3:.0f} ms fused")
    ada.restore(peft_model)  # plain PEFT again


if __name__ == "__main__":
    main()
