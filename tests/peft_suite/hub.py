"""Tiny random models in a cache of the hub, under the names that PEFT's tests ask for.

PEFT's tests of whole models fetch them from the hub. Their weights do not matter there, so that
random ones of the same classes do where the hub cannot be reached.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

VOCABULARY = 1100
REVISION = "0" * 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1099,
    "pad_token_id": 1,
}
FEW_HEADS: dict[str, Any] = {"num_key_value_heads": 2}
CODERS: dict[str, Any] = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32,
    "decoder_start_token_id": 2,
}  # fmt: skip
# the class, the type of the config, what it has beside SIZES
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM", "opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "gpt2", {}),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "gpt2", {}),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "gpt2", {}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM", "gptj", {"rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "llama", FEW_HEADS),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "llama", FEW_HEADS),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (
        "MistralForCausalLM", "mistral", FEW_HEADS),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "qwen2", FEW_HEADS),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM", "gemma3_text", {**FEW_HEADS, "head_dim": 8}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration", "t5",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0}),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration", "bart", CODERS),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "bert", {}),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "roberta", {}),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel", "deberta", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model", "deberta-v2",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Of whole words."""
    special = ["<s>", "<pad>", "<unk>"]
    words = [*special, *(f"word{i}" for i in range(VOCABULARY - len(special) - 1)), "</s>"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
    )


def fill(cache: Path) -> None:
    """Write all of them into a folder that HF_HUB_CACHE may name."""
    for place, (name, (kind, config_type, own)) in enumerate(KINDS.items()):
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION, encoding="utf-8")
        transformers.set_seed(place)
        config = AutoConfig.for_model(config_type, **{**SIZES, **own})
        getattr(transformers, kind)(config).save_pretrained(snapshot)
        tokenizer().save_pretrained(snapshot)


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
