"""What `grouped_lora_linear` refuses, each with one line that names the argument."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adarank_kernels.errors import AdarankError, AdarankTypeError


def check_arguments(
    x: Tensor,
    weights: Sequence[Tensor | None],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    dropout: float,
    bases: Sequence[Tensor | None],
) -> None:
    """Raise where a module does not fit x, or dropout is no probability."""
    if not 0.0 <= dropout <= 1.0:
        raise AdarankError(f"dropout must be in [0, 1], got {dropout}")
    if not x.is_floating_point():
        raise AdarankTypeError(f"x must be floating point, got {x.dtype}")
    width = x.shape[-1] if x.dim() else -1
    modules = zip(weights, lora_As, lora_Bs, biases, bases, strict=True)
    for m, (weight, A, B, bias, base) in enumerate(modules):
        if base is not None:
            out = base.shape[-1] if base.dim() else -1
            if base.shape[:-1] != x.shape[:-1] or not base.is_floating_point():
                raise AdarankError(
                    f"base_outputs[{m}] must be floating point [*{list(x.shape[:-1])}, out], "
                    f"got {base.dtype} {list(base.shape)}"
                )
        elif weight is None:
            raise AdarankError(f"module {m} has neither weights[{m}] nor base_outputs[{m}]")
        else:
            if weight.dtype != x.dtype:
                raise AdarankTypeError(
                    f"weights[{m}] must have x's dtype {x.dtype}, got {weight.dtype}"
                )
            if weight.dim() != 2 or weight.shape[1] != width:
                raise AdarankError(f"weights[{m}] must be [out, {width}], got {list(weight.shape)}")
            out = weight.shape[0]
            if bias is not None and tuple(bias.shape) != (out,):
                raise AdarankError(f"biases[{m}] must be [{out}], got {list(bias.shape)}")
        if (A is None) != (B is None):
            raise AdarankError(f"lora_As[{m}] and lora_Bs[{m}] must both be given or both be None")
        if A is not None and B is not None:
            if A.dim() != 2 or A.shape[1] != width:
                raise AdarankError(f"lora_As[{m}] must be [rank, {width}], got {list(A.shape)}")
            if tuple(B.shape) != (out, A.shape[0]):
                raise AdarankError(
                    f"lora_Bs[{m}] must be [{out}, {A.shape[0]}], got {list(B.shape)}"
                )
            if not (A.is_floating_point() and B.is_floating_point()):
                raise AdarankTypeError(
                    f"lora_As[{m}] and lora_Bs[{m}] must be floating point, got {A.dtype}"
                )
        for name, tensor in (("weights", weight), ("lora_As", A), ("lora_Bs", B), ("biases", bias)):
            if tensor is not None and tensor.device != x.device:
                raise AdarankError(f"{name}[{m}] is on {tensor.device}, x on {x.device}")


def check_lengths(M: int, **lists: Sequence[object]) -> None:
    """Raise where a list has not one entry per module."""
    for name, values in lists.items():
        if len(values) != M:
            raise AdarankError(f"{name} must have one entry per module ({M}), got {len(values)}")
