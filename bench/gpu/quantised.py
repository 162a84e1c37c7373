"""NF4 bases by bitsandbytes."""

from __future__ import annotations

from typing import Any

from torch import nn

from bench.gpu.rivals import NotRun


def quantise(model: Any) -> None:
    """Every linear layer but the head, in place, as transformers' loader does it.

    Raises:
        NotRun: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise NotRun(f"not run: {error}") from None
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                weight = child.weight
                made = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None,
                    compute_dtype=weight.dtype, quant_type="nf4", device="meta",
                )  # fmt: skip
                made.weight = bnb.nn.Params4bit(
                    weight.data.cpu(), requires_grad=False, quant_type="nf4"
                ).to(weight.device)
                made.bias = child.bias
                setattr(module, name, made)
    model.is_loaded_in_4bit = True
