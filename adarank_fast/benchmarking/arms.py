"""The variants of one model that a benchmark times. All share its frozen weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adarank_fast.adapters.accelerate import accelerate, restore
from adarank_fast.adapters.compile_blocks import compile_blocks
from adarank_fast.adapters.inject import inject
from adarank_fast.benchmarking.measure import Step
from adarank_fast.errors import AdarankError
from adarank_fast.models.batches import Batch
from adarank_fast.models.transformers_private import is_moved_by_hooks
from adarank_fast.plan.rank_plan import RankPlan

FROZEN, PEFT, PEFT_DEFAULT = "frozen", "PEFT", "PEFT, float32"
OURS, OURS_DEFAULT = "ours", "ours, float32"
UNIFORM, COMPILED = "ours, uniform", "ours, compiled"
GRAPHED = {f"{arm}, graphed": arm for arm in (FROZEN, PEFT, OURS)}  # on a GPU; what is captured
SAME = {OURS: PEFT, OURS_DEFAULT: PEFT_DEFAULT}  # what computes the same in the same dtype
SAME |= {f"{OURS}, graphed": f"{PEFT}, graphed"}
FLOORS = dict.fromkeys(GRAPHED, f"{FROZEN}, graphed")  # of every other: FROZEN
RATE = 1e-4  # of AdamW


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares the model's storages, with gradients down to its embeddings.

    So every variant computes the same products with the frozen weights in its backward pass, as it
    does in training. The model itself stays as it is.

    Raises:
        AdarankError: it is offloaded, or its input embeddings cannot be found.
    """
    if any(map(is_moved_by_hooks, model.modules())):
        raise AdarankError(
            "the model is spread over devices or offloaded; benchmark it on one device"
        )
    memo: dict[int, object] = {id(b): b for b in model.buffers()}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        else:  # quantised ones, which are frozen anyway
            memo[id(parameter)] = parameter
    copied = cast("PreTrainedModel", copy.deepcopy(model, memo).eval())
    try:
        embeddings = copied.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    if embeddings is None:
        raise AdarankError(
            f"{type(model).__name__} has no get_input_embeddings(), where the backward pass ends; "
            "give a transformers model that has one"
        )
    weight = getattr(embeddings, "weight", None)
    for module in copied.modules():  # encoder and decoder may each have a module of one weight
        if module is embeddings or weight is not None and getattr(module, "weight", 0) is weight:
            if module is not copied.get_output_embeddings():
                module.register_forward_hook(_require_grad)
    return copied


def _require_grad(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output.requires_grad_(True)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of its modules: frozen parameters and buffers are the same, adapters are new."""
    memo: dict[int, object] = {id(p): p for p in model.parameters() if not p.requires_grad}
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo)


def adapted(frozen: nn.Module, plan: RankPlan, dtype: torch.dtype) -> nn.Module:
    """PEFT's model with adapters in `dtype`; no B is zero, so that every gradient counts."""
    model = restore(inject(shared_copy(frozen), plan)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:
                noise = 0.02 * torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(noise)
    return model


def fused(peft_model: nn.Module, example: Batch) -> nn.Module:
    """A copy with fused layers and adapters of its own."""
    return accelerate(shared_copy(peft_model), example)


def compiled(peft_model: nn.Module, example: Batch) -> nn.Module:
    """Fused and compiled block by block."""
    return compile_blocks(fused(peft_model, example))


def make_arms(
    frozen: nn.Module,
    plan: RankPlan,
    uniform: RankPlan | None,
    dtype: torch.dtype,
    example: Batch,
) -> dict[str, nn.Module]:
    """Every eager variant, by its name.

    Args:
        frozen: from `frozen_copy`.
        plan: the ranks of PEFT's and our variants.
        uniform: of another of ours, where the plan's ranks are mixed.
        dtype: of the base; of its activations where it is quantised.
        example: keyword inputs that show which layers share an input.
    """
    arms = {FROZEN: frozen, PEFT: adapted(frozen, plan, dtype)}
    if dtype != torch.float32:
        arms[PEFT_DEFAULT] = adapted(frozen, plan, torch.float32)
        arms[OURS_DEFAULT] = fused(arms[PEFT_DEFAULT], example)
    arms[OURS] = fused(arms[PEFT], example)
    if uniform is not None:
        arms[UNIFORM] = fused(adapted(frozen, uniform, dtype), example)
    return arms


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that require gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss if it has one on this batch, else a fixed sum over its output.

    A mean square would not do: behind a norm it is constant, and its gradients are noise.
    """
    outputs = model(**batch)
    loss = getattr(outputs, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    values = outputs.values() if isinstance(outputs, Mapping) else [outputs]
    first = next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
    weights = torch.arange(first.shape[-1], device=first.device, dtype=torch.float32).cos()
    return (first.to(torch.promote_types(first.dtype, torch.float32)) * weights).mean()


def step_of(
    model: nn.Module,
    batch: Batch,
    loss: Callable[[], Tensor] | None = None,
    capturable: bool = False,
) -> Step:
    """Forward, loss, backward, and AdamW where there is something to train.

    Args:
        model: whose parameters that require gradients are trained.
        batch: keyword inputs.
        loss: computes it; None: `loss_of` of the batch.
        capturable: for a CUDA graph.
    """
    parameters = trainable(model)
    compute = loss or functools.partial(loss_of, model, batch)
    optimiser = None
    if parameters:
        optimiser = torch.optim.AdamW(parameters, lr=RATE, fused=True, capturable=capturable)

    def step() -> None:
        if optimiser is not None:
            optimiser.zero_grad(set_to_none=True)
        compute().backward()
        if optimiser is not None:
            optimiser.step()

    return step


def gradients(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The loss and the gradient of every adapter parameter, on the CPU in float32 or above."""
    loss = loss_of(model, batch)
    found = torch.autograd.grad(loss, trainable(model))
    kept = [loss.detach(), *found]
    return [t.cpu() if t.dtype == torch.float64 else t.float().cpu() for t in kept]


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest of the loss' error and the gradients' as one vector, relative."""

    def one(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))

    both = [torch.cat([t.flatten().double() for t in each[1:]]) for each in (found, wanted)]
    errors = [one(found[0], wanted[0]), one(both[0], both[1])]
    return max(errors, key=lambda error: error if error == error else float("inf"))
