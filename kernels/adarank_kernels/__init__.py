"""Tensors in, tensors out: the fused operations of adarank-fast. Needs torch and triton only."""

from adarank_kernels.philox import philox_normal, philox_normal_ref

__all__ = ["philox_normal", "philox_normal_ref"]
