"""Other libraries' LoRA functions on the layers of a PEFT model, where they are installed.

Unsloth's and axolotl's compute q/k/v in one function, o in one and a gated MLP in one; LoRAFusion's
are a layer each. They run as published: a package that does more than define itself on import is
entered below its `__init__`, nothing of it is copied or changed. Liger patches norms, MLPs and the
loss of a whole model.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

HF = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
HF |= {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class NotRun(Exception):
    """Why a rival is left out: "not run: ..."."""


@dataclass(frozen=True)
class Rival:
    """Another library's functions.

    Attributes:
        name: of the variant.
        module: that has them.
        entered: packages whose `__init__` is passed over.
        dropout: whether they have any.
        swap: puts them into a PEFT model, given the module.
    """

    name: str
    module: str
    entered: tuple[str, ...]
    dropout: bool
    swap: Callable[[ModuleType, nn.Module], None]


def enter(packages: tuple[str, ...]) -> None:
    """Packages of which single modules are to be imported without running their `__init__`."""
    for name in packages:
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"no package {name}")
        package = ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules[name] = package


def imported(module: str, entered: tuple[str, ...] = ()) -> ModuleType:
    """The module.

    Raises:
        NotRun: it is not installed, or cannot be imported here.
    """
    package = module.partition(".")[0]
    before = set(sys.modules)
    # Unsloth writes code that it has compiled into the working folder otherwise
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", f"{tempfile.gettempdir()}/unsloth_compiled")
    try:
        enter(entered)
        return importlib.import_module(module)
    except Exception as error:  # whatever someone else's package raises on import
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in {package, *entered}:
                del sys.modules[name]
        said = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {said[0] if said else ''}"
        raise NotRun(f"not run: {package} cannot be imported ({why})"[:200]) from None


def swapped(rival: Rival, peft_model: nn.Module, dropout: float) -> nn.Module:
    """The model with the rival's functions in the place of PEFT's forwards.

    Raises:
        NotRun: why not.
    """
    found = imported(rival.module, rival.entered)
    if dropout and not rival.dropout:
        raise NotRun("not run: its functions have no dropout")
    rival.swap(found, peft_model)
    return peft_model


def versions() -> dict[str, str | None]:
    """Of the packages that are installed."""
    found: dict[str, str | None] = {}
    for name in ("unsloth", "axolotl", "lorafusion", "liger-kernel", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def owners(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, nn.Module]]]:
    """Modules that hold projections by transformers' names, or this benchmark's short ones."""
    for module in model.modules():
        children = dict(module.named_children())
        named = {HF[key]: children[key] for key in HF if key in children}
        named |= {name: children[name] for name in HF.values() if name in children}
        if named:
            yield module, named


def swap_functions(functions: Any, model: nn.Module) -> None:
    """`apply_lora_qkv`, `apply_lora_o`, `apply_lora_mlp_swiglu`, each called with the owner."""
    for owner, layers in list(owners(model)):
        held = SimpleNamespace(**layers, training=True)
        if {"q_proj", "k_proj", "v_proj"} <= layers.keys():
            _share(layers, functools.partial(functions.apply_lora_qkv, held))
        if "o_proj" in layers:
            layers["o_proj"].forward = functools.partial(functions.apply_lora_o, held)
        if {"gate_proj", "up_proj", "down_proj"} <= layers.keys():
            whole = "feed_forward" if hasattr(owner, "feed_forward") else "forward"
            setattr(owner, whole, functools.partial(functions.apply_lora_mlp_swiglu, held))


def _share(layers: dict[str, nn.Module], apply: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """q computes all three; k and v hand theirs out."""
    waiting: list[Tensor] = []

    def first(x: Tensor) -> Tensor:
        q, waiting[:] = (found := apply(x))[0], found[1:]
        return q

    layers["q_proj"].forward = first
    for name in ("k_proj", "v_proj"):
        layers[name].forward = lambda x: waiting.pop(0)


def swap_layers(functions: Any, model: nn.Module) -> None:
    """`lora_forward(layer, x)` in every LoRA layer."""
    for _, layers in list(owners(model)):
        for layer in layers.values():
            if hasattr(layer, "lora_A"):
                layer.forward = functools.partial(functions.lora_forward, layer)


RIVALS = (
    Rival(
        "Unsloth's functions", "unsloth.kernels.fast_lora",
        ("unsloth", "unsloth.kernels", "unsloth_zoo"), False, swap_functions,
    ),
    Rival(
        "axolotl's functions", "axolotl.kernels.lora", ("axolotl", "axolotl.kernels"),
        True, swap_functions,
    ),
    Rival(
        "LoRAFusion's functions", "lorafusion.patch.patch_lora", ("lorafusion", "lorafusion.patch"),
        True, swap_layers,
    ),
)  # fmt: skip


def with_liger(frozen: nn.Module) -> nn.Module:
    """Liger's norms, MLPs and linear cross entropy in this instance of a causal LM.

    Raises:
        NotRun: why not.
    """
    patches = imported("liger_kernel.transformers.monkey_patch")
    config: Any = frozen.config
    name = f"apply_liger_kernel_to_{config.model_type}"
    if not hasattr(patches, name):
        raise NotRun(f"not run: liger_kernel has no {name}")
    modeling = importlib.import_module(type(frozen).__module__)
    before = dict(vars(modeling))
    try:  # rope=False: that one is replaced for every model of the process
        getattr(patches, name)(
            rope=False, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True,
            swiglu=True, model=frozen,
        )  # fmt: skip
    except Exception as error:
        raise NotRun(f"not run: {type(error).__name__}: {error}"[:200]) from None
    finally:
        vars(modeling).clear()
        vars(modeling).update(before)
    return frozen
