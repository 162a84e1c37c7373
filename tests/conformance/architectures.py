"""The table of architectures: each row builds a tiny random model and a batch for it.

A new architecture is a new row. Names are the last parts of module names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.dinov2 import modeling_dinov2

from adarank_fast.models.outputs import OutputChoice

VOCABULARY = 90
ITEMS = 3

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
DECODER = {**SIZES, "num_key_value_heads": 2}
IMAGES = dict(image_size=12, patch_size=4)


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        build: makes the model, weights random.
        batch: makes its keyword inputs.
        attention: what target_modules="attention" must find: last name parts, and how many modules.
        linear: the same for "all-linear".
        groups: the shared-input groups among "all-linear", as "q_proj+k_proj+v_proj gate+up".
        experts: last name parts of 3-D expert parameters, which get adapters too.
        one_by_one: last name parts of linears that are probed one by one, here or there.
        output: of `predict_ranks`.
        pretrained: its weights are not random, and left as they are.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    attention: tuple[str, int]
    linear: tuple[str, int]
    groups: str
    experts: str = ""
    one_by_one: str = ""
    output: OutputChoice = "auto"
    pretrained: bool = False


def hub(auto: str, model_type: str, **config: Any) -> Callable[[], nn.Module]:
    """A transformers model of an AutoModel class, from its configuration."""

    def build() -> nn.Module:
        settings = transformers.AutoConfig.for_model(model_type, **config)
        return getattr(transformers, auto).from_config(settings)

    return build


def text() -> dict[str, Any]:
    """Token ids, padded on the right."""
    lengths, width = torch.tensor([9, 7, 4]), 9
    mask = (torch.arange(width) < lengths[:, None]).long()
    return {"input_ids": _ids(width) * mask, "attention_mask": mask}


def tokens() -> dict[str, Any]:
    return {"input_ids": _ids(9)}


def text_to_text() -> dict[str, Any]:
    return {**text(), "decoder_input_ids": _ids(5)}


def images() -> dict[str, Any]:
    return {"pixel_values": _normal(ITEMS, 3, 12, 12)}


def images_and_text() -> dict[str, Any]:
    return {**images(), **text()}


def audio() -> dict[str, Any]:
    return {"input_features": _normal(ITEMS, 8, 20), "decoder_input_ids": _ids(5)}


def vectors() -> dict[str, Any]:
    return {"src": _normal(ITEMS, 7, 32)}


def _ids(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (ITEMS, width), generator=generator)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _encoder_layers() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)


ENCODER, CAUSAL, SEQ2SEQ = "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
GATED = "q_proj+k_proj+v_proj gate_proj+up_proj"
GATED_LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"

DINOV2_ATTENTION, DINOV2_GROUP = (  # renamed after transformers 5.17
    ("query key value dense", "key+value+query")
    if hasattr(modeling_dinov2, "Dinov2SelfAttention")
    else ("q_proj k_proj v_proj o_proj", "q_proj+k_proj+v_proj")
)

ARCHITECTURES = {
    "BERT": Architecture(
        hub(ENCODER, "bert", **SIZES),
        text,
        ("query key value dense", 8),
        ("query key value dense", 12),
        "query+key+value",
    ),
    "RoBERTa": Architecture(
        hub(ENCODER, "roberta", **SIZES),
        text,
        ("query key value dense", 8),
        ("query key value dense", 12),
        "query+key+value",
    ),
    "DistilBERT": Architecture(
        hub(ENCODER, "distilbert", **SIZES, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
        text,
        ("q_lin k_lin v_lin out_lin", 8),
        ("q_lin k_lin v_lin out_lin lin1 lin2", 12),
        "q_lin+k_lin+v_lin",
    ),
    "DeBERTa-v2": Architecture(
        hub(
            ENCODER,
            "deberta-v2",
            **SIZES,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            max_position_embeddings=64,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
        text,
        ("query_proj key_proj value_proj dense", 8),
        ("query_proj key_proj value_proj dense", 12),
        "query_proj+key_proj+value_proj",
        one_by_one="query_proj key_proj",
    ),
    "MPNet": Architecture(
        hub(ENCODER, "mpnet", **SIZES),
        text,
        ("q k v o", 8),
        ("q k v o dense", 12),
        "q+k+v",
    ),
    "ModernBERT": Architecture(
        hub(ENCODER, "modernbert", **SIZES, global_attn_every_n_layers=2),
        text,
        ("Wqkv Wo", 4),
        ("Wqkv Wo Wi", 8),
        "",
    ),
    "GPT-2": Architecture(
        hub(CAUSAL, "gpt2", **SIZES),
        text,
        ("c_attn c_proj", 4),
        ("c_attn c_proj c_fc", 8),
        "",
    ),
    "GPT-NeoX": Architecture(
        hub(CAUSAL, "gpt_neox", **SIZES),
        text,
        ("query_key_value dense", 4),
        ("query_key_value dense dense_h_to_4h dense_4h_to_h", 8),
        "",
    ),
    "Falcon": Architecture(
        hub(CAUSAL, "falcon", **SIZES, new_decoder_architecture=True, num_kv_heads=2),
        text,
        ("query_key_value dense", 4),
        ("query_key_value dense dense_h_to_4h dense_4h_to_h", 8),
        "",
    ),
    "OPT": Architecture(
        hub(CAUSAL, "opt", **SIZES, ffn_dim=48, word_embed_proj_dim=32),
        text,
        ("q_proj k_proj v_proj out_proj", 8),
        ("q_proj k_proj v_proj out_proj fc1 fc2", 12),
        "q_proj+k_proj+v_proj",
    ),
    "Llama": Architecture(
        hub(CAUSAL, "llama", **DECODER),
        text,
        ("q_proj k_proj v_proj o_proj", 8),
        (GATED_LINEARS, 14),
        GATED,
    ),
    "Mistral": Architecture(
        hub(CAUSAL, "mistral", **DECODER),
        text,
        ("q_proj k_proj v_proj o_proj", 8),
        (GATED_LINEARS, 14),
        GATED,
    ),
    "Qwen3": Architecture(
        hub(CAUSAL, "qwen3", **DECODER, head_dim=8),
        text,
        ("q_proj k_proj v_proj o_proj", 8),
        (GATED_LINEARS, 14),
        GATED,
    ),
    "Gemma 3": Architecture(
        hub(CAUSAL, "gemma3_text", **DECODER, head_dim=8),
        text,
        ("q_proj k_proj v_proj o_proj", 8),
        (GATED_LINEARS, 14),
        GATED,
    ),
    "Phi-3": Architecture(
        hub(CAUSAL, "phi3", **DECODER),
        text,
        ("qkv_proj o_proj", 4),
        ("qkv_proj o_proj gate_up_proj down_proj", 8),
        "",
    ),
    "SmolLM3": Architecture(
        hub(CAUSAL, "smollm3", **DECODER),
        text,
        ("q_proj k_proj v_proj o_proj", 8),
        (GATED_LINEARS, 14),
        GATED,
    ),
    "Mixtral": Architecture(
        hub(CAUSAL, "mixtral", **DECODER, num_local_experts=4),
        text,
        ("q_proj k_proj v_proj o_proj", 8),
        ("q_proj k_proj v_proj o_proj", 8),
        "q_proj+k_proj+v_proj",
        experts="gate_up_proj down_proj",
    ),
    "Qwen3-MoE": Architecture(
        hub(
            CAUSAL,
            "qwen3_moe",
            **DECODER,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
        ),
        text,
        ("q_proj k_proj v_proj o_proj", 8),
        ("q_proj k_proj v_proj o_proj", 8),
        "q_proj+k_proj+v_proj",
        experts="gate_up_proj down_proj",
    ),
    "Switch Transformers": Architecture(  # experts are modules; a router chooses among them
        hub(
            SEQ2SEQ,
            "switch_transformers",
            **SIZES,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=4,
        ),
        text_to_text,
        ("q k v o", 24),
        ("q k v o wi wo", 44),
        "q+k+v k+v",
        one_by_one="wi wo",
    ),
    "T5": Architecture(
        hub(SEQ2SEQ, "t5", **SIZES, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        text_to_text,
        ("q k v o", 24),
        ("q k v o wi wo", 32),
        "q+k+v k+v",
    ),
    "BART": Architecture(
        hub(
            SEQ2SEQ,
            "bart",
            **SIZES,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=32,
        ),
        text_to_text,
        ("q_proj k_proj v_proj out_proj", 24),
        ("q_proj k_proj v_proj out_proj fc1 fc2", 32),
        "q_proj+k_proj+v_proj k_proj+v_proj",
    ),
    "Whisper": Architecture(
        hub(
            "AutoModelForSpeechSeq2Seq",
            "whisper",
            **SIZES,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=16,
            decoder_start_token_id=1,
        ),
        audio,
        ("q_proj k_proj v_proj out_proj", 24),
        ("q_proj k_proj v_proj out_proj fc1 fc2", 32),
        "q_proj+k_proj+v_proj k_proj+v_proj",
    ),
    "ViT": Architecture(
        hub(ENCODER, "vit", **SIZES, **IMAGES),
        images,
        ("q_proj k_proj v_proj o_proj", 8),
        ("q_proj k_proj v_proj o_proj fc1 fc2", 12),
        "q_proj+k_proj+v_proj",
    ),
    "CLIP": Architecture(
        hub(
            ENCODER,
            "clip",
            text_config={**SIZES, "max_position_embeddings": 16, "projection_dim": 32},
            vision_config={**SIZES, **IMAGES, "projection_dim": 32},
            projection_dim=32,
        ),
        images_and_text,
        ("q_proj k_proj v_proj out_proj", 16),
        ("q_proj k_proj v_proj out_proj fc1 fc2 visual_projection text_projection", 26),
        "q_proj+k_proj+v_proj",
        output=lambda outputs: torch.cat([outputs.text_embeds, outputs.image_embeds], dim=1),
    ),
    "DINOv2": Architecture(
        hub(ENCODER, "dinov2", **SIZES, **IMAGES, mlp_ratio=2),
        images,
        (DINOV2_ATTENTION, 8),
        (f"{DINOV2_ATTENTION} fc1 fc2", 12),
        DINOV2_GROUP,
    ),
    "Mamba": Architecture(
        hub(CAUSAL, "mamba", **SIZES, state_size=4, time_step_rank=4),
        tokens,
        ("", 0),
        ("in_proj x_proj", 4),
        "",
    ),
    "torch.nn.TransformerEncoder": Architecture(
        _encoder_layers,
        vectors,
        ("", 0),
        ("linear1 linear2", 4),
        "",
    ),
}
