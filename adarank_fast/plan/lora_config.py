"""A plan's ranks as a `peft.LoraConfig`: one anchored key for each rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adarank_fast.errors import AdarankError
from adarank_fast.options import RANGES, shown

if TYPE_CHECKING:
    from peft import LoraConfig

CONSTANT_SCALING = 2.0  # lora_alpha = 2 * rank
PAPER_ALPHA = 8  # AdaRank's LoRA scale is 8 / rank
RSLORA_ALPHA = 8  # scale 8 / sqrt(rank): the constant 2 at rank 16

DECIDED_BY_PLAN = {
    "r": "ranks come from the plan (plan.allocate spends another budget)",
    "rank_pattern": "ranks come from the plan (plan.allocate spends another budget)",
    "target_modules": "the plan's modules with rank > 0 are the targets",
    "target_parameters": "the plan's modules with rank > 0 are the targets",
    "exclude_modules": "the plan's modules with rank > 0 are the targets",
    "layers_to_transform": "the plan's modules with rank > 0 are the targets",
    "layers_pattern": "the plan's modules with rank > 0 are the targets",
    "layer_replication": "the plan's modules with rank > 0 are the targets",
    "lora_alpha": "pass scaling=2.0 for lora_alpha = 2 * rank",
    "alpha_pattern": "pass scaling=2.0 for lora_alpha = 2 * rank",
    "use_rslora": 'pass scaling="rslora"',
}

# what PEFT's adapters of parameters do not have
NOT_OF_EXPERTS = ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out")
# they read the weight of a linear layer
INITS_OF_LAYERS = ("pissa", "corda", "olora", "loftq", "lora_ga")


def lora_config(
    ranks: Mapping[str, int],
    scaling: str | float,
    optional_prefix: str = "",
    parameters: Collection[str] = (),
    has_experts: bool = False,
    **lora_config_kwargs: Any,
) -> LoraConfig:
    r"""A LoraConfig with one anchored key for all modules of a rank.

    PEFT reads rank_pattern keys as `(.*\.)?(key)$`, first match wins, and sorts them when saving:
    keys must be anchored at the start, so that `layers.0.q` is not `vision.layers.0.q`, and must
    not overlap. It tries the keys one by one for each module, and Python keeps 512 compiled ones:
    with a key a module, 840 modules took a minute to load, with a key a rank about a second.
    target_modules is a regex for the full name, since PEFT matches a list's elements as suffixes;
    but a list for models with 3-D expert parameters, where PEFT reduces what a regex matches to the
    last parts of the names and so targets other layers too.

    Args:
        ranks: full module name -> rank; rank 0 is left out.
        optional_prefix: what may stand before every name, such as "bert.".
        parameters: which of the names are 3-D expert parameters, PEFT's `target_parameters`.
        has_experts: whether the model has any, in the plan or not.
        scaling: see `RankPlan.to_lora_config`.
        **lora_config_kwargs: see `RankPlan.to_lora_config`.
    """
    from peft import LoraConfig

    for argument, remedy in DECIDED_BY_PLAN.items():
        if argument in lora_config_kwargs:
            value = lora_config_kwargs[argument]
            raise AdarankError(f"{argument}={value!r} cannot be given with a plan: {remedy}")
    alpha_of = alpha_rule(scaling)
    names: dict[int, list[str]] = {}
    for name, rank in ranks.items():
        if rank > 0:
            names.setdefault(rank, []).append(name)
    if not names:
        raise AdarankError("every rank of the plan is 0, nothing gets an adapter; raise the budget")
    prefix = f"(?:{re.escape(optional_prefix)})?" if optional_prefix else ""
    # PEFT's `$` also matches before a newline that ends a name
    end = r"\Z" if any(name.endswith("\n") for name in ranks) else ""

    def any_of(these: Sequence[str]) -> str:
        return f"{prefix}(?:{'|'.join(map(re.escape, these))})"

    keys = {rank: f"^{any_of(names[rank])}{end}" for rank in sorted(names)}
    modules = [name for name, rank in ranks.items() if rank > 0 and name not in parameters]
    experts = [name for name, rank in ranks.items() if rank > 0 and name in parameters]
    refuse_for_experts(experts, lora_config_kwargs)
    largest = max(keys)
    return LoraConfig(
        **{
            **lora_config_kwargs,
            "r": largest,  # for tools that size buffers by it; every module has its own key
            "lora_alpha": alpha_of(largest),
            "rank_pattern": {key: rank for rank, key in keys.items()},
            "alpha_pattern": {key: alpha_of(rank) for rank, key in keys.items()},
            "target_modules": any_of(modules) if modules and not has_experts else modules,
            "target_parameters": experts or None,
            "use_rslora": scaling == "rslora",
        }
    )


def refuse_for_experts(experts: Sequence[str], lora_config_kwargs: Mapping[str, object]) -> None:
    """Refuse `LoraConfig` arguments that PEFT has not for parameters of experts.

    Args:
        experts: names of the parameters.
        lora_config_kwargs: the arguments.

    Raises:
        AdarankError: which it is.
    """
    if not experts:
        return
    given = {name: lora_config_kwargs.get(name) for name in NOT_OF_EXPERTS}
    init = str(lora_config_kwargs.get("init_lora_weights", ""))
    given["init_lora_weights"] = init if init.startswith(INITS_OF_LAYERS) else None
    for name, value in given.items():
        if value:
            raise AdarankError(
                f"{name}={value!r}: PEFT has it for layers, not for parameters of experts "
                f'({experts[0]}); leave it out, or leave experts out (target_modules="attention")'
            )


def alpha_rule(scaling: str | float) -> Callable[[int], float]:
    """The function rank -> lora_alpha of a scaling convention; see `RankPlan.to_lora_config`."""
    if scaling == "paper":
        return lambda rank: PAPER_ALPHA
    if scaling == "rslora":
        return lambda rank: RSLORA_ALPHA
    constant = CONSTANT_SCALING if scaling == "constant" else scaling
    if constant not in RANGES["scaling"]:
        raise AdarankError(
            'scaling must be "constant", "paper", "rslora" or a positive number, got '
            f"{shown(scaling)}"
        )
    constant = float(constant)

    def proportional(rank: int) -> float:
        alpha = constant * rank
        return int(alpha) if alpha == int(alpha) else alpha

    return proportional
