"""Which modules of a model get a rank: their names, shapes and blocks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from adarank_fast.errors import AdarankError, AdarankTypeError
from adarank_fast.models.experts import expert_shapes, experts_per_token, holds_experts
from adarank_fast.models.text import list_names
from adarank_fast.models.torch_private import compiled_from, is_read_not_called
from adarank_fast.options import DEFAULT_TARGETS, TARGET_PRESETS

TargetModules = str | Iterable[str]

WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|base_model\.model\.)+")  # DDP, compile, PEFT


@dataclass(frozen=True)
class Target:
    """One linear module, or one 3-D parameter of experts, that can get an adapter.

    Attributes:
        name: the module's name in the bare base model (see `canonical_name`); for a parameter, the
            parameter's.
        path: its name in the model at hand, as `model.get_submodule` takes it.
        module: the module itself; for a PEFT layer, its base layer; the experts of a parameter.
        in_features, out_features: the shape of the product, whatever layout stores it. For a
            parameter, that of all experts side by side: rank * (in + out) is what PEFT spends.
        block: path of the block that holds it (see `find_block`), or None.
        parameter: name of the 3-D parameter in `module`; "" for a linear module.
        experts: how many a parameter has; 1 for a linear module.
        experts_per_token: how many of them are active for a token; None: the model does not say.
    """

    name: str
    path: str
    module: nn.Module
    in_features: int
    out_features: int
    block: str | None
    parameter: str = ""
    experts: int = 1
    experts_per_token: int | None = None

    @property
    def weight(self) -> Tensor:
        """What a probe perturbs, as it is stored."""
        return cast(Tensor, getattr(self.module, self.parameter or "weight"))

    @property
    def weight_path(self) -> str:
        """Its name in the model at hand, as `model.get_parameter` takes it."""
        return self.path if self.parameter else f"{self.path}.weight"

    @property
    def bias(self) -> Tensor | None:
        """The linear module's bias; experts' biases are left alone."""
        return None if self.parameter else getattr(self.module, "bias", None)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a Linear or Conv1D, quantised or not; else None.

    Also None for `out_proj` of a torch.nn.MultiheadAttention: it reads that weight and never calls
    the module, so that neither a probe nor an adapter there would have an effect.
    """
    if is_read_not_called(module):
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # transformers': weight is [in, out]
        return cast(Any, module).nx, cast(Any, module).nf
    return None


def canonical_name(path: str, model: nn.Module | None = None) -> str:
    """The name a module has in the bare base model.

    `module.`, `_orig_mod.`, PEFT's prefix and a trailing `.base_layer` are stripped; then the
    model's own `base_model_prefix` is: `bert.encoder.layer.0` and `encoder.layer.0` are one module.
    """
    path = WRAPPERS.sub("", path).replace("._orig_mod.", ".").removesuffix(".base_layer")
    prefix = base_model_prefix(model) if model is not None else ""
    return path.removeprefix(prefix)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, `torch.compile` and PEFT wrappers."""
    while True:
        if (compiled := compiled_from(model)) is not None:
            model = compiled
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = cast(nn.Module, model.module)
        elif any(cls.__name__ == "PeftModel" for cls in type(model).__mro__):
            model = cast(Any, model).get_base_model()
        else:
            return model


def base_model_prefix(model: nn.Module) -> str:
    """`"bert."` for a BertForSequenceClassification, `""` for a bare base model."""
    model = unwrap(model)
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


# PEFT refuses out_proj in these model types; their forwards read both weights and call neither.
MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})


MAMBA_READS = frozenset({"out_proj", "dt_proj"})


HEADS = frozenset({"lm_head", "classifier", "score", "qa_outputs", "pooler"})


def find_targets(model: nn.Module, target_modules: TargetModules = DEFAULT_TARGETS) -> list[Target]:
    """What of `model` gets a rank, in the model's own order.

    Args:
        model: any torch module; DDP, `torch.compile` and PEFT wrappers are looked through.
        target_modules: `"auto"`: `"attention"`, and `"experts"` where the model has them.
            `"attention"`: every Linear / Conv1D beneath a module whose class name contains
            "Attention", the output projection included. `"all-linear"`: every Linear / Conv1D but
            heads, poolers and what Mamba models read without calling. `"experts"`: every 3-D
            parameter of a module whose class name contains "Experts"; one rank for all experts of
            a parameter. Any other string: a regex that must match a full name. A list: full names,
            dotted suffixes of names (also of 3-D parameters, `mlp.experts.down_proj`) and presets.

    Raises:
        AdarankError: nothing matches, or an element of the list does not.
        AdarankTypeError: `target_modules` is neither a string nor an iterable of strings.
    """
    model = unwrap(model)
    candidates = list({target.name: target for target in find_candidates(model)}.values())
    if not isinstance(target_modules, str):
        return _named(target_modules, candidates, model)
    if target_modules in TARGET_PRESETS:
        return _preset(target_modules, candidates, model)
    return _matching(target_modules, candidates)


def find_candidates(model: nn.Module) -> list[Target]:
    """Everything in `model`, unwrapped, that can get a rank: linear modules, expert parameters."""
    found = []
    for path, module in model.named_modules():
        if is_adapter(path):
            continue
        if shape := linear_shape(module):
            name = canonical_name(path, model)
            found.append(Target(name, path, module, *shape, find_block(model, path)))
            continue
        for part, (count, fan_in, fan_out) in expert_shapes(module).items():
            whole = f"{path}.{part}" if path else part
            found.append(
                Target(
                    name=canonical_name(whole, model).replace(".base_layer", ""),
                    path=whole,
                    module=module,
                    in_features=count * fan_in,
                    out_features=count * fan_out,
                    block=find_block(model, whole),
                    parameter=part,
                    experts=count,
                    experts_per_token=experts_per_token(
                        module, reversed([*_above(model, whole)][:-1]), count
                    ),
                )
            )
    return found


def find_blocks(model: nn.Module) -> list[str]:
    """Paths of all elements of outermost ModuleLists: the layers of a transformer's towers."""
    paths = (path for path, _ in model.named_modules())
    return [path for path in paths if path and find_block(model, path) == path]


def find_block(model: nn.Module, path: str) -> str | None:
    """The block that holds `path`: an element of the outermost ModuleList above it, or None."""
    parts = path.split(".")
    lists = (d for d, module in enumerate(_above(model, path)) if isinstance(module, nn.ModuleList))
    depth = next(lists, None)
    return None if depth is None else ".".join(parts[: depth + 1])


def _above(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that hold `path`, from the model down to its parent."""
    module = model
    for part in path.split("."):
        yield module
        module = getattr(module, part)


def alternatives(model: nn.Module, path: str) -> set[str]:
    """Paths as `path`, but in other elements of a ModuleList or ModuleDict: the other experts."""
    parts = path.split(".")
    return {
        ".".join([*parts[:depth], name, *parts[depth + 1 :]])
        for depth, module in enumerate(_above(model, path))
        if isinstance(module, (nn.ModuleList, nn.ModuleDict))
        for name, _ in module.named_children()
        if name != parts[depth]
    }


def _preset(preset: str, candidates: list[Target], model: nn.Module) -> list[Target]:
    """Those of a preset.

    Raises:
        AdarankError: there are none.
    """
    linears = [target for target in candidates if not target.parameter]
    if preset == "all-linear":
        return _all_linear(linears, model)
    attention = {t.name for t in linears if _is_in_attention(t, model)}
    experts = {t.name for t in candidates if t.parameter and holds_experts(t.module)}
    chosen = {"attention": attention, "experts": experts}.get(preset, attention | experts)
    if not chosen or preset == DEFAULT_TARGETS and not attention:
        raise _nothing_found(preset, linears, model)
    return [target for target in candidates if target.name in chosen]


def _is_in_attention(target: Target, model: nn.Module) -> bool:
    above = _above(model, target.path)
    return any("Attention" in type(module).__name__ for module in above)


def _nothing_found(preset: str, linears: list[Target], model: nn.Module) -> AdarankError:
    """Why a preset names nothing in this model, and what to pass instead."""
    said = f'target_modules="{preset}"'
    names = list_names(sorted(target.name for target in linears))
    if preset == "experts":
        return AdarankError(
            f"{said} found no experts in 3-D parameters in {type(model).__name__}; experts that "
            f"are modules of their own are named as such, for example {names}"
        )
    if any(isinstance(m, nn.MultiheadAttention) for m in model.modules()):
        return AdarankError(
            f"{said}: torch.nn.MultiheadAttention reads the weights of its "
            "projections and never calls them, so they cannot get a rank; pass "
            f'"all-linear" or names, for example {names}'
        )
    classes = sorted({type(m).__name__ for m in model.modules() if any(m.children())})
    return AdarankError(
        f"{said} found no Linear or Conv1D beneath a module whose class "
        f"name contains 'Attention' (classes here: {list_names(classes)}); "
        f'pass "all-linear" or names, for example {names}'
    )


def _all_linear(linears: list[Target], model: nn.Module) -> list[Target]:
    """All of the base model but heads, poolers and what Mamba models read without calling."""
    prefix = base_model_prefix(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    of_mamba = getattr(getattr(model, "config", None), "model_type", None) in MAMBA
    left_out = HEADS | MAMBA_READS if of_mamba else HEADS
    chosen = [
        target
        for target in linears
        if target.path.startswith(prefix)
        and target.module is not head
        and left_out.isdisjoint(target.path.split("."))
    ]
    if not chosen:
        raise AdarankError('target_modules="all-linear" found no Linear or Conv1D in the model')
    return chosen


def _matching(regex: str, candidates: list[Target]) -> list[Target]:
    """Those whose full name matches."""
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise AdarankError(f"target_modules={regex!r} is not a valid regex: {error}") from error
    chosen = [t for t in candidates if pattern.fullmatch(t.name) or pattern.fullmatch(t.path)]
    if not chosen:
        raise AdarankError(
            f"target_modules={regex!r} matches no linear module; a string is a regex "
            "for the full name (pass a list for suffixes); "
            f"near matches: {_near(regex, candidates)}"
        )
    return chosen


def _named(names: Iterable[str], candidates: list[Target], model: nn.Module) -> list[Target]:
    """Those whose full name, or its end, is among `names`."""
    try:
        wanted = list(names)
        if not all(isinstance(item, str) for item in wanted):
            raise TypeError
    except TypeError:
        raise AdarankTypeError(
            f"target_modules must be a string or a list of strings, got {names!r}"
        ) from None
    if not wanted:
        raise AdarankError("target_modules is empty; name at least one module")

    chosen = set()
    for item in wanted:
        called = {
            t.name for t in candidates if _ends_with(t.name, item) or _ends_with(t.path, item)
        }
        if not called and item in TARGET_PRESETS:
            called = {target.name for target in _preset(item, candidates, model)}
        if not called:
            other = [m for p, m in model.named_modules() if _ends_with(p, item)]
            why = "matches no module"
            if other:
                why = f"names a {type(other[0]).__name__}, not a Linear or Conv1D"
                if is_read_not_called(other[0]):
                    why = "names a projection that torch.nn.MultiheadAttention never calls"
            raise AdarankError(
                f"target_modules: {item!r} {why}; near matches: {_near(item, candidates)}"
            )
        chosen |= called
    return [target for target in candidates if target.name in chosen]


def is_adapter(path: str) -> bool:
    """True for what PEFT adds inside its layers (`lora_A`, `lora_B`, ...)."""
    return any(part.startswith("lora_") for part in path.split("."))


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _near(item: str, candidates: list[Target]) -> str:
    """Names, or last parts of names, that look like `item`; else the last parts there are."""
    last_parts = sorted({target.name.rsplit(".", 1)[-1] for target in candidates})
    near = difflib.get_close_matches(item.rsplit(".", 1)[-1], last_parts, n=3, cutoff=0.5)
    return list_names(near or last_parts)
