"""What a model's output is when disagreement is measured: which tensor, which positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adarank_fast.errors import AdarankError
from adarank_fast.models.batches import Batch, batch_size, take
from adarank_fast.models.forward_patching import (
    ForwardPatches,
    StopForward,
    flags_restored,
)
from adarank_fast.models.targets import base_model_prefix, is_adapter
from adarank_fast.models.transformers_private import came_from_checkpoint
from adarank_fast.options import OUTPUTS

Outputs = Any  # what a model returns: of transformers, a tensor, a tuple, a dict
OutputChoice = str | Callable[[Outputs], Tensor]


@dataclass(frozen=True)
class Output:
    """A tensor to read off a model.

    Attributes:
        name: as plans give it: "mean_pooled_hidden_state", "logits", ...
        root: path, in the model at hand, of the module to run ("" is the model itself): its base
            model where the head plays no part.
        read: (the root's outputs, its inputs) -> [B, ...] tensor, one row per item.
    """

    name: str
    root: str
    read: Callable[[Outputs, Batch], Tensor]


@dataclass(frozen=True)
class OutputReader:
    """Runs a model as far as the output asks for it.

    Attributes:
        root: the module to run.
        output: what to read off it.
        head: the language-model head, if the output is exactly what it returns. Then it is never
            run: what is read is its input, hidden states [B, T, D].
    """

    root: nn.Module
    output: Output
    head: nn.Module | None = None

    def read(
        self,
        batch: Batch,
        patches: ForwardPatches | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The output of one forward, or the head's input: [B, D], [B, T, D], ...

        Args:
            batch: the keyword inputs.
            patches: of modules' forwards, for this forward only.
            parameters: names (in the whole model) -> replacements, for this forward only.

        Raises:
            AdarankError: the output is no tensor with a row per item.
        """
        hidden: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            hidden.append(x)
            raise StopForward

        last = ForwardPatches({self.head: lambda _: keep} if self.head else {})
        arguments = accepted(self.root, batch)
        try:
            with (patches or ForwardPatches()).applied(), last.applied():
                if not parameters:
                    outputs = self.root(**arguments)
                else:
                    prefix = f"{self.output.root}." if self.output.root else ""
                    local = {k.removeprefix(prefix): v for k, v in parameters.items()}
                    outputs = functional_call(self.root, local, kwargs=arguments)
            value = self.output.read(outputs, batch)
        except StopForward:
            value = hidden[0]
        name, rows = self.output.name, batch_size(batch)
        if not isinstance(value, Tensor) or not value.dim():
            raise AdarankError(
                f"output {name!r} must give a tensor with a row per item, "
                f"got {type(value).__name__}"
            )
        if value.shape[0] != rows:
            raise AdarankError(
                f"output {name!r} must have a row per item ({rows}), got shape {tuple(value.shape)}"
            )
        return value[:, None] if value.dim() == 1 else value


def mean_pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, D] -> [B, D]: the mean over the positions where `mask` [B, T] is not 0.

    Of 16-bit hidden states in float32, so that the mean is not rounded to 16 bits.
    """
    hidden = hidden.float() if hidden.element_size() < 4 else hidden
    if hidden.dim() < 3 or mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1) if hidden.dim() == 3 else hidden
    weights = mask.to(hidden.dtype)
    return torch.einsum("btd,bt->bd", hidden, weights) / weights.sum(1, keepdim=True).clamp_min(1)


def position_mask(model: nn.Module, inputs: Batch) -> Tensor | None:
    """[B, T], non-zero where a position of the output counts; None if all do."""
    decoder = "decoder_input_ids" in inspect.signature(type(model).forward).parameters
    mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _tensor(outputs: Outputs) -> Tensor | None:
    """The tensor of a module that returns just one, bare or in a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    if type(outputs) in (tuple, list) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    return None


def choose_output(model: nn.Module, choice: OutputChoice, batch: Batch) -> Output:
    """Which tensor `choice` means for this model.

    `"auto"` takes the logits of a language-model head that was really loaded, else the last hidden
    state of the base model, mean-pooled over unmasked positions; for a module that returns a bare
    tensor, that tensor.

    Args:
        model: in eval mode.
        choice: "auto", "pooler", "last_hidden_state", "logits" or a callable on the outputs.
        batch: whose first item it is tried on; the whole batch if the model takes no part of it.

    Raises:
        AdarankError: the model rejects the batch; an unknown name, an output the model does not
            have, or one that depends on weights that were missing from the checkpoint.
    """
    tried = _Tried(model, batch)
    base = base_model_prefix(model).rstrip(".")

    def pooled(outputs: Outputs, inputs: Batch) -> Tensor:
        return mean_pool(outputs.last_hidden_state, position_mask(model, inputs))

    if callable(choice):
        return Output("callable", "", lambda outputs, inputs: choice(outputs))
    logits = Output("logits", "", _attribute("logits"))
    known = {
        "logits": logits,
        "pooler": Output("pooler", base, _attribute("pooler_output")),
        "last_hidden_state": Output("last_hidden_state", base, _attribute("last_hidden_state")),
    }
    if choice in known:
        return _checked(tried, known[choice])
    if choice != "auto":
        raise AdarankError(
            f"output={choice!r} is unknown; use one of {', '.join(OUTPUTS)} or a callable"
        )
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        if not _untrained_on_path(tried, logits):
            return logits
    elif not hasattr(model, "config"):
        if _tensor(tried.outputs) is not None:
            return Output("tensor", "", lambda outputs, inputs: cast(Tensor, _tensor(outputs)))
    return _checked(tried, Output("mean_pooled_hidden_state", base, pooled))


def small_sample(model: nn.Module, batch: Batch) -> Batch:
    """The first item of a batch; the whole batch for a model that rejects a part of it."""
    return accepted_part(partial(_run, model, ""), batch, 1)


def accepted_part(run: Callable[[Batch], object], batch: Batch, items: int) -> Batch:
    """The first `items` items of a batch; all if `run` rejects those, as if its size were fixed."""
    part = take(batch, items)
    if batch_size(batch) > items:
        try:
            run(part)
        except Exception:  # any error of a model on inputs that it cannot take
            return batch
    return part


def rejection(model: nn.Module, what: str, batch: Batch, error: Exception) -> AdarankError:
    """An error of one line for a batch that a model cannot take: its shapes and the reason."""
    tensors = {key: list(v.shape) for key, v in batch.items() if isinstance(v, Tensor)}
    shapes = ", ".join(f"{key} {shape}" for key, shape in tensors.items())
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    ids = batch.get("input_ids")
    if isinstance(longest, int) and isinstance(ids, Tensor) and ids.dim() == 2:
        if ids.shape[1] > longest:
            reason += f" (max_position_embeddings of its config is {longest}; use shorter items)"
    return AdarankError(f"the model rejects {what} ({shapes}): {reason}")


class _Tried:
    """A small sample of a batch, and what the model returned for it."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model = model
        found: list[Outputs] = []
        self.sample = accepted_part(lambda part: found.append(_run(model, "", part)), batch, 1)
        try:
            self.outputs = found[0] if found else _run(model, "", self.sample)
        except Exception as error:
            raise rejection(model, "the first item of batches", self.sample, error) from error

    def of(self, root: str) -> Outputs:
        """What a part of the model returns for the sample."""
        return _run(self.model, root, self.sample) if root else self.outputs


def _attribute(name: str) -> Callable[[Outputs, Batch], Tensor]:
    def read(outputs: object, inputs: Batch) -> Tensor:
        value: Tensor | None = getattr(outputs, name, None)
        if value is None:
            raise AttributeError(name)
        return value

    return read


def _checked(tried: _Tried, output: Output) -> Output:
    try:
        untrained = _untrained_on_path(tried, output)
    except AttributeError as error:
        outputs = tried.of(output.root)
        has = ", ".join(outputs.keys()) if hasattr(outputs, "keys") else type(outputs).__name__
        wanted = error.args[0].split()[-1].strip("'")
        raise AdarankError(
            f"the model has no output {wanted!r} (it returns: {has}); "
            "choose another output= or pass a callable that takes the outputs"
        ) from None
    if untrained:
        raise AdarankError(
            f"output {output.name!r} depends on weights that the checkpoint did not have: "
            f"{', '.join(untrained[:4])}{', ...' if len(untrained) > 4 else ''}; load them, choose "
            "another output=, or pass a callable to use the new weights all the same"
        )
    return output


def _untrained_on_path(tried: _Tried, output: Output) -> list[str]:
    """Names of freshly initialised parameters that `output` depends on.

    A model with parameters that came from a checkpoint was loaded; its others were not in it. Which
    of these the output depends on is read off autograd, on one small batch and only if there are
    any.
    """
    model, sample = tried.model, tried.sample
    named = dict(model.named_parameters())
    loaded = {name for name, p in named.items() if came_from_checkpoint(p)}
    fresh = {
        name: p
        for name, p in named.items()
        if loaded and name not in loaded and p.is_floating_point() and not is_adapter(name)
    }
    if not fresh:
        output.read(tried.of(output.root), sample)  # AttributeError if it is not there
        return []
    with flags_restored(model), torch.enable_grad():
        for name, parameter in named.items():
            parameter.requires_grad_(name in fresh)
        value = output.read(_run(model, output.root, sample), sample)
        if not value.requires_grad:
            return []
        grads = torch.autograd.grad(value.sum(), list(fresh.values()), allow_unused=True)
    return [name for name, grad in zip(fresh, grads, strict=True) if grad is not None]


def _run(model: nn.Module, root: str, inputs: Batch) -> Outputs:
    module = model.get_submodule(root)
    return module(**accepted(module, inputs))


def accepted(module: nn.Module, inputs: Batch) -> Batch:
    """The entries of `inputs` that `module.forward` takes."""
    parameters = inspect.signature(type(module).forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return inputs
    return {key: value for key, value in inputs.items() if key in parameters}
