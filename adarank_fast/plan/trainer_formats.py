"""A plan as the LoRA settings of a trainer: PEFT, axolotl, LLaMA-Factory.

What each accepts was read in its source; docs/serving.md links to it.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

from adarank_fast.errors import AdarankError
from adarank_fast.files import write_text
from adarank_fast.plan.rank_plan import RankPlan

if TYPE_CHECKING:
    from peft import LoraConfig


def render(plan: RankPlan, format: str = "peft", scaling: str | float = "constant") -> str:
    """The text of the settings, ending in a newline.

    Args:
        plan: see `RankPlan`.
        format: "peft": JSON that `LoraConfig(**json.load(file))` takes; "axolotl" and
            "llama-factory": YAML lines to put into the configuration file.
        scaling: see `RankPlan.to_lora_config`.

    Raises:
        AdarankError: unknown format, or one that cannot express the plan.
    """
    if format not in _FORMATS:
        raise AdarankError(f"format={format!r} is unknown; use one of {', '.join(_FORMATS)}")
    config = plan.to_lora_config(scaling)
    if config.target_parameters and format == "llama-factory":
        raise AdarankError(
            f"{format}: the plan has ranks for expert parameters ({config.target_parameters[0]}), "
            "for which it has no setting; use format='peft' or 'axolotl', or leave experts out "
            '(target_modules="attention")'
        )
    return _FORMATS[format](plan, config)


def export_plan(
    plan: RankPlan,
    path: str | os.PathLike[str],
    format: str = "peft",
    scaling: str | float = "constant",
) -> None:
    """Write a plan as a trainer's LoRA settings.

    Args:
        plan: see `RankPlan`.
        path: the file to write; never half-written.
        format: "peft" (JSON, arguments of `LoraConfig`), "axolotl" or "llama-factory" (YAML,
            lines for its configuration file).
        scaling: see `RankPlan.to_lora_config`.

    Raises:
        AdarankError: unknown format, or one that cannot express the plan.
    """
    write_text(path, render(plan, format, scaling))


def _peft(plan: RankPlan, config: LoraConfig) -> str:
    settings = {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "target_modules": _targets(config),
        "use_rslora": config.use_rslora,
    }
    if config.target_parameters:
        settings["target_parameters"] = config.target_parameters
    return json.dumps(settings, indent=1, ensure_ascii=False) + "\n"


def _targets(config: LoraConfig) -> str | list[str]:
    """The regex; or the names of modules, which PEFT keeps as a set."""
    targets = config.target_modules or ()
    return targets if isinstance(targets, str) else sorted(targets)


def _axolotl(plan: RankPlan, config: LoraConfig) -> str:
    """Its lora_rank_pattern and lora_alpha_pattern go to PEFT as they are."""
    experts = config.target_parameters
    return _yaml(
        adapter="lora",
        lora_r=config.r,
        lora_alpha=_whole(config.lora_alpha, "axolotl"),
        lora_target_modules=_targets(config),
        **({"lora_target_parameters": experts} if experts else {}),
        lora_rank_pattern=config.rank_pattern,
        lora_alpha_pattern={
            k: _whole(a, "axolotl") for k, a in (config.alpha_pattern or {}).items()
        },
        peft_use_rslora=config.use_rslora,
    )


def _llama_factory(plan: RankPlan, config: LoraConfig) -> str:
    """One lora_rank for all modules; lora_target is a list of names, matched as suffixes."""
    ranks = sorted({rank for rank in plan.ranks.values() if rank > 0})
    if len(ranks) > 1:
        raise AdarankError(
            f"llama-factory has one lora_rank for all modules, the plan has {ranks[0]} to "
            f"{ranks[-1]}; save an untrained adapter with inject(model, plan)"
            ".save_pretrained(folder) and set adapter_name_or_path to that folder: it goes on "
            "training with each module's rank"
        )
    names = [name for name, rank in plan.ranks.items() if rank > 0]
    if odd := [name for name in names if "," in name]:
        raise AdarankError(
            f"llama-factory takes a list with commas, which the name {odd[0]!r} has; use "
            "format='peft'"
        )
    return _yaml(
        finetuning_type="lora",
        lora_rank=config.r,
        lora_alpha=_whole(config.lora_alpha, "llama-factory"),
        lora_target=",".join(names),
        use_rslora=config.use_rslora,
    )


_FORMATS = {"peft": _peft, "axolotl": _axolotl, "llama-factory": _llama_factory}


def _whole(alpha: float, trainer: str) -> int:
    if alpha != int(alpha):
        raise AdarankError(
            f"{trainer} takes whole numbers for lora_alpha only, this scaling gives {alpha}; "
            "choose another scaling"
        )
    return int(alpha)


def _yaml(**settings: object) -> str:
    """JSON is YAML: strings, keys too, are written quoted, mappings a line a key."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, dict):
            lines += [f"{name}:", *(f"  {json.dumps(k)}: {json.dumps(value[k])}" for k in value)]
        else:
            lines.append(f"{name}: {json.dumps(value)}")
    return PAIR.sub(_one_escape, "\n".join(lines) + "\n")


PAIR = re.compile(r"\\ud[89ab]..\\ud[c-f]..")  # how JSON, and not YAML, says one character


def _one_escape(pair: re.Match[str]) -> str:
    character: str = json.loads(f'"{pair[0]}"')
    return f"\\U{ord(character):08x}"
