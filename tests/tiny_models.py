"""Small random models for the tests, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

VOCABULARY = 90


def spread(model: nn.Module) -> nn.Module:
    """Larger weights and biases than the initialisation's, so that disagreements differ."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise, alpha=0.05)
    return model.eval()


def tiny(kind: str, layers: int = 3, width: int = 32) -> PreTrainedModel:
    set_seed(0)
    common = dict(vocab_size=VOCABULARY)
    if kind == "bert":
        model = BertModel(
            BertConfig(
                hidden_size=32,
                num_hidden_layers=layers,
                num_attention_heads=4,
                intermediate_size=48,
                **common,
            )
        )
    elif kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=2 * width,
                **common,
            )
        )
    elif kind == "gemma":
        model = GemmaForCausalLM(
            GemmaConfig(
                hidden_size=width,
                head_dim=width // 4,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=2 * width,
                **common,
            )
        )
    elif kind == "mixtral":  # 4 experts of 48 in 3-D parameters, 2 of them active
        model = MixtralForCausalLM(
            MixtralConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
                num_local_experts=4,
                num_experts_per_tok=2,
                **common,
            )
        )
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=layers, n_head=4, **common))
    elif kind == "t5":
        model = T5ForConditionalGeneration(
            T5Config(
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=layers,
                num_heads=4,
                decoder_start_token_id=0,
                **common,
            )
        )
    elif kind == "deberta":
        model = DebertaV2Model(
            DebertaV2Config(
                hidden_size=32,
                num_hidden_layers=layers,
                num_attention_heads=4,
                intermediate_size=48,
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                position_buckets=8,
                max_position_embeddings=64,
                share_att_key=True,
                norm_rel_ebd="layer_norm",
                **common,
            )
        )
    else:
        raise ValueError(kind)
    return spread(model)


def batch(
    kind: str, lengths: tuple[int, ...] = (9, 7, 9, 4), seed: int = 0, width: int | None = None
) -> dict[str, Any]:
    """Padded on the right to `width`, or the longest of `lengths`."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), width or max(lengths))
    ids = torch.randint(3, VOCABULARY, size, generator=generator)
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    out: dict[str, Any] = {"input_ids": ids * mask, "attention_mask": mask}
    if kind == "t5":
        out["decoder_input_ids"] = ids[:, :5].clone()
    return out


def rows(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {k: v[start:stop] if isinstance(v, Tensor) else v for k, v in batch.items()}
