"""Tensors in, tensors out: the fused operations of adarank-fast. Needs torch and triton only."""

from adarank_kernels.disagreement.op import pairwise_disagreement
from adarank_kernels.disagreement.reference import pairwise_disagreement_ref
from adarank_kernels.lora.op import grouped_lora_linear, lora_linear
from adarank_kernels.lora.reference import grouped_lora_linear_ref, lora_linear_ref
from adarank_kernels.random.philox import philox_normal
from adarank_kernels.random.reference import philox_normal_ref

__all__ = [
    "grouped_lora_linear",
    "grouped_lora_linear_ref",
    "lora_linear",
    "lora_linear_ref",
    "pairwise_disagreement",
    "pairwise_disagreement_ref",
    "philox_normal",
    "philox_normal_ref",
]
