"""Writes docs/compatibility.md: every architecture through every step of tests/conformance.

python bench/compatibility.py [NAME ...]      names: rows to try, without writing the page

Beyond the tests: three pretrained models, and inductor as the compiler's backend (10 to 20 seconds
a row).
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from adarank_fast.demo.assets import AssetError
from adarank_fast.files import replacing
from bench.results_file import machine
from tests.conformance import steps
from tests.conformance.architectures import ARCHITECTURES
from tests.conformance.pretrained import PRETRAINED

ROWS = {**ARCHITECTURES, **PRETRAINED}

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
FAILED = "**no**"
SHORT = ("route", "fused calls", "groups", "attention / all linear", "plain PEFT")

TEXT = """# Compatibility

Written by `make compatibility`, from the steps of `tests/conformance`, which `make test` runs
too; do not edit. Each row is built small from its transformers configuration (hidden size 32, two
layers, random weights, float32, on the CPU), gets adapters of mixed ranks on all linear modules,
and is taken through every step. The last three are pretrained models; of those `make test` has
MiniLM only, and it leaves inductor out. {versions}

## Architectures

{found}

- *attention / all linear*: modules that `target_modules="attention"` and `"all-linear"` find.
  Mamba has no attention, and torch.nn.MultiheadAttention never calls its projections: both say
  so.
- *groups*: modules that read the same tensor and are computed together.
- *route*: how prediction probes the modules: variants folded into the batch, or one by one, which
  each row has to announce: DeBERTa-v2's query and key run twice, experts get the tokens that a
  router sends them.
- *fused calls*: share of the LoRA layers' calls that took the fused path, in training and
  inference, where PEFT uses `lora.Linear`; below 95% the row fails, and so it does if one of them
  is never called.
- *plain PEFT*: other layers tried; they keep PEFT's own adapters, and `fusion_report` says why.

## Steps

{steps}

- *predict*: two trials of every target; scores equal those of full forwards with perturbed
  weights (1e-4).
- *train*: the gradients of two steps equal plain PEFT's (float32, 1e-5).
- *save, load*: plain PEFT loads the saved adapter and gives the same outputs (1e-5).
- *inject*: ranks as planned. Expert parameters (3-D) get PEFT's `target_parameters` adapters, one
  rank for all experts of a parameter; name them in `target_modules`, `"all-linear"` leaves them
  out.
- *export*: `export_uniform`; plain PEFT loads it, rank 8 and scale 1 everywhere, and gives the same
  outputs (1e-5). Adapters of expert parameters are refused.
- *compile*, *inductor*: the first block of each tower under `torch.compile`, backend aot_eager
  (1e-5) and inductor (1e-4): same gradients.
- *checkpointing*: `gradient_checkpointing_enable`, reentrant and not: same gradients, every layer
  computed twice; by hand: `torch.utils.checkpoint` around each block, where the model offers none.
- torch.nn.TransformerEncoder: with `torch.backends.mha.set_fastpath_enabled(False)`; otherwise
  its eval mode passes by every adapter, and `inject` warns.
"""


def inductor(subject: steps.Subject) -> str:
    """Dropout draws the numbers that it draws in eager mode; sums are added in other orders."""
    with torch._inductor.config.patch(fallback_random=True):
        return steps.compiled(subject, backend="inductor", tolerance=1e-4)


STEPS = {**steps.STEPS, "inductor": inductor}


def run(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """What each step returned for each architecture, or `FAILED`; errors go to stderr."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        print(name, file=sys.stderr)
        try:
            subject = steps.Subject(ROWS[name])
        except AssetError as error:
            print(f"{name}: {error}", file=sys.stderr)
            found[name] = dict.fromkeys(STEPS, "not run")
            continue
        cells = found[name] = {}
        for step, function in STEPS.items():
            try:
                with steps.slow_path(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    cells[step] = function(subject)
            except Exception:  # a cell of the table, whatever went wrong
                cells[step] = FAILED
                print(f"{name}, {step}:", file=sys.stderr)
                traceback.print_exc()
    return found


def table(found: dict[str, dict[str, str]], columns: Sequence[str]) -> str:
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in found.items():
        lines.append(f"| {name} | {' | '.join(cells[column] for column in columns)} |")
    return "\n".join(lines)


def main(names: Sequence[str]) -> int:
    if unknown := [name for name in names if name not in ROWS]:
        print(f"no row {unknown[0]!r}; rows: {', '.join(ROWS)}", file=sys.stderr)
        return 2
    found = run(names or list(ROWS))
    failed = sum(cell == FAILED for cells in found.values() for cell in cells.values())
    if names:
        print(table(found, list(STEPS)))
        return int(bool(failed))
    here = machine()
    packages = ", ".join(f"{name} {number}" for name, number in here["versions"].items() if number)
    text = TEXT.format(
        versions=f"Last run: {here['date']}, {packages}.",
        found=table(found, SHORT),
        steps=table(found, [step for step in STEPS if step not in SHORT]),
    )
    with replacing(PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.name}: {len(found)} rows, {failed} failed cells")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
