"""Compile a model block by block; one graph serves blocks of different ranks.

torch.compile takes parameters' shapes as constants and gives up after 8 versions of one function
(`torch._dynamo.config.recompile_limit`); blocks of one class run one function, and mixed ranks make
every block another version. So the rank dimensions are marked, and shapes of parameters may vary.
"""

from __future__ import annotations

from torch import nn

from adarank_fast.adapters.fusion_report import fusion_report
from adarank_fast.adapters.peft_private import Layer
from adarank_fast.adapters.torch_private import (
    mark_dynamic,
    parameter_shape_settings,
    set_parameter_shape_settings,
    undo_compile,
)
from adarank_fast.errors import AdarankError
from adarank_fast.models.targets import find_blocks, unwrap
from adarank_fast.undo import undone_on_error


def compile_blocks(peft_model: nn.Module, **compile_kwargs: object) -> nn.Module:
    """`torch.compile` for each block on its own (regional compilation), in place.

    Sets `torch._dynamo.config.force_parameter_static_shapes` and
    `force_nn_module_property_static_shapes` to False for the process: they are read whenever a
    block is traced. Blocks whose adapters sit on other modules (ranks of 0) or have rank 1 need a
    graph of their own; `min_rank=2` or `rank_multiple` in `predict_ranks` avoids both. A key-value
    cache makes every block differ too: pass decoders use_cache=False.

    Args:
        peft_model: from `inject` or `accelerate`, its groups found (pass them `example`, or run
            one forward).
        compile_kwargs: of `torch.compile`, such as backend or mode.

    Returns:
        `peft_model`.

    Raises:
        AdarankError: nothing is fused, or the model has no blocks (elements of a ModuleList).
    """
    report = fusion_report(peft_model)
    inner = unwrap(peft_model)
    blocks = find_blocks(inner)
    if not blocks:
        raise AdarankError(
            f"{type(inner).__name__} has no ModuleList of blocks; use torch.compile on the model"
        )
    modules = [inner.get_submodule(path) for path in blocks]
    layers: list[Layer] = [peft_model.get_submodule(path) for path in report]
    factors = [
        (part.weight, dimension)
        for layer in layers
        for dimension, name in enumerate(("lora_A", "lora_B"))
        for part in getattr(layer, name, {}).values()
    ]
    undo_calls = undo_compile(modules)
    marks = [(weight, dict(vars(weight))) for weight, _ in factors]
    shapes = parameter_shape_settings()

    def undo() -> None:
        set_parameter_shape_settings(shapes)
        for weight, attributes in marks:
            vars(weight).clear()
            vars(weight).update(attributes)
        undo_calls()

    with undone_on_error(undo):
        set_parameter_shape_settings(dict.fromkeys(shapes, False))
        for weight, dimension in factors:
            mark_dynamic(weight, dimension)
        for module in modules:
            module.compile(**compile_kwargs)
    return peft_model
