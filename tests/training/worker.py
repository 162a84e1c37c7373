"""One of two processes: DDP through accelerate, then FSDP2, each against one process's numbers.

Started by test_two_processes.py. Prints the cases that passed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import adarank_fast as ada
from tests.training.small import GROUPS, adapters, assert_near, inputs, mixed_llama

STEPS = 3
Trace = list[tuple[float, dict[str, Tensor]]]  # of each step: the loss, the adapters' gradients


def train(
    model: nn.Module,
    rows: slice,
    optimiser: torch.optim.Optimizer,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Trace:
    """A few steps on these rows of each batch; losses and gradients are means over processes."""
    trace = []
    for step in range(STEPS):
        optimiser.zero_grad()
        loss = model(**{k: v[rows] for k, v in inputs(step).items()}).loss
        backward(loss)
        grads = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                grad = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
                grads[name.removeprefix("module.")] = grad
        optimiser.step()
        mean = loss.detach().clone()
        if rows != slice(None):
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        trace.append((mean.item(), grads))
    return trace


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def one_process() -> Trace:
    """Plain PEFT on whole batches."""
    torch.manual_seed(0)
    model = mixed_llama()
    return train(model, slice(None), sgd(model))


def assert_same(ours: Trace, theirs: Trace) -> None:
    assert len({loss for loss, _ in theirs}) == STEPS
    for (loss, grads), (expected, expected_grads) in zip(ours, theirs, strict=True):
        assert abs(loss - expected) <= 1e-5 * expected, (loss, expected)
        assert_near(grads, expected_grads)


def reasons(model: nn.Module) -> set[str]:
    return set().union(*(layer.reasons for layer in ada.fusion_report(model).values()))


def group_sizes(model: nn.Module) -> set[int]:
    return {len(layer.group) for layer in ada.fusion_report(model).values()}


def own_rows() -> slice:
    return slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)


def ddp(expected: Trace, checkpointing: bool) -> None:
    accelerator = Accelerator(cpu=True)
    model = ada.accelerate(mixed_llama())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    prepared, optimiser = accelerator.prepare(model, sgd(model))
    assert type(prepared).__name__ == "DistributedDataParallel"
    assert_same(train(prepared, own_rows(), optimiser, accelerator.backward), expected)
    report = ada.fusion_report(prepared)
    assert report.fused_share == 1.0 and group_sizes(prepared) == GROUPS, str(report)
    theirs = adapters(model)
    for tensor in theirs.values():
        dist.broadcast(tensor, 0)
    assert_near(adapters(model), theirs, 0.0)  # the processes hold the same adapters


def shard(model: PeftModel, units: list[nn.Module]) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())


def decoder_layers(model: PeftModel) -> list[nn.Module]:
    return list(model.base_model.model.model.layers)


def fsdp_decoder_layers(expected: Trace, checkpointing: bool = False, after: bool = False) -> None:
    """Inside a unit's forward and backward its parameters are plain tensors: all is fused."""
    model = mixed_llama()
    if not after:
        ada.accelerate(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    shard(model, decoder_layers(model))
    if after:
        ada.accelerate(model)
    assert_same(train(model, own_rows(), sgd(model)), expected)
    report = ada.fusion_report(model)
    assert report.fused_share == 1.0 and group_sizes(model) == GROUPS, str(report)


def fsdp_lora_layers(expected: Trace) -> None:
    """Each LoRA layer a unit: its neighbours are sharded, so it is fused, but alone."""
    model = ada.accelerate(mixed_llama(), example=inputs(0))
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    shard(model, layers)
    assert_same(train(model, own_rows(), sgd(model)), expected)
    assert ada.fusion_report(model).fused_share == 1.0
    assert_refused("restore before sharding", lambda: ada.restore(model))
    assert ada.fusion_report(model).fused_share == 1.0  # nothing half done
    late = mixed_llama()
    shard(late, [m for m in late.modules() if hasattr(m, "lora_A")])
    assert_refused("accelerate first, then shard", lambda: ada.accelerate(late))


def assert_refused(message: str, act: Callable[[], object]) -> None:
    try:
        act()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no ValueError: {message}")


def fsdp_parts(expected: Trace) -> None:
    """lora_A and lora_B as units, as PEFT's wrap policy makes them: PEFT's own forward, counted."""
    model = ada.accelerate(mixed_llama())
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    parts = [m[name] for layer in layers for m in (layer.lora_A, layer.lora_B) for name in m]
    shard(model, parts + decoder_layers(model))
    assert_same(train(model, own_rows(), sgd(model)), expected)
    assert ada.fusion_report(model).fused_share == 0.0
    assert reasons(model) == {"hooks inside the layer"}, reasons(model)


def main(folder: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    expected = one_process()
    cases: dict[str, Callable[[], None]] = {
        "ddp": lambda: ddp(expected, checkpointing=False),
        "ddp, checkpointing": lambda: ddp(expected, checkpointing=True),
        "fsdp": lambda: fsdp_decoder_layers(expected),
        "fsdp, checkpointing": lambda: fsdp_decoder_layers(expected, checkpointing=True),
        "fsdp, accelerated after": lambda: fsdp_decoder_layers(expected, after=True),
        "fsdp, LoRA layers as units": lambda: fsdp_lora_layers(expected),
        "fsdp, lora_A and lora_B as units": lambda: fsdp_parts(expected),
    }
    for name, case in cases.items():
        case()
        print("passed:", name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
