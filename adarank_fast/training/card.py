"""Files beside an adapter's weights: its classes, a record of how it was made, a model card."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

RECORD = "training.json"
GENERATED = 64  # tokens that the card's snippet generates


@dataclass(frozen=True)
class Result:
    """How an adapter was made, and its metrics.

    Attributes:
        base_model: folder or hub name.
        task: "classification" or "causal-lm".
        form: of the data: "labelled", "text", "completion" or "chat".
        classes: their names, by number.
        data: names of the data files, training first.
        examples: of the training data.
        ranks: module -> rank.
        parameters: of all adapters.
        settings: fields of `TrainingArguments` or `SFTConfig` that are not the libraries' defaults.
        steps: of the run.
        measured_on: what `before` and `after` are metrics of.
        before, after: see `evaluation.metrics`.
        curve: see `Training.curve`.
        other_head: the checkpoint has a head for another number of classes.
    """

    base_model: str
    task: str
    form: str
    classes: Sequence[str]
    data: Sequence[str]
    examples: int
    ranks: Mapping[str, int]
    parameters: int
    settings: Mapping[str, object]
    steps: int
    measured_on: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    curve: Sequence[tuple[int, float]] = ()
    other_head: bool = False
    versions: Mapping[str, str] = field(
        default_factory=lambda: {
            name: version(name) for name in ("adarank-fast", "peft", "torch", "transformers")
        }
    )


def write_beside(
    folder: Path,
    result: Result,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str | os.PathLike[str],
) -> None:
    """Write the tokenizer, the record and the card; for classification the configuration, too.

    Args:
        folder: of the adapter.
        result: how the adapter was made.
        config: the trained model's; its class names are what the card's snippet reads.
        tokenizer: of the model.
        name: what the snippets call the adapter.
    """
    tokenizer.save_pretrained(folder)
    if result.task == "classification":
        config = copy.deepcopy(config)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config  # of the run, not of the model
        config.save_pretrained(folder)
    record = json.dumps(asdict(result), indent=1) + "\n"
    (folder / RECORD).write_text(record, encoding="utf-8")
    (folder / "README.md").write_text(card(result, str(name)), encoding="utf-8")


def read_record(folder: str | os.PathLike[str]) -> dict[str, object]:
    """The record that `write_beside` wrote; empty if there is none that can be read."""
    try:
        found = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def card(result: Result, name: str) -> str:
    """The model card, in the hub's form: front matter, then Markdown."""
    used = [rank for rank in result.ranks.values() if rank]
    rows = [f"| {key} | {_shown(result.before[key])} | {_shown(result.after[key])} |"
            for key in result.after if key not in ("tokens", "examples")]  # fmt: skip
    classes = ", ".join(result.classes[:10]) + (", ..." if len(result.classes) > 10 else "")
    merged = f"{name}-merged"
    kind = "classification" if result.task == "classification" else "language modelling"
    lines = [
        *_front_matter(result),
        f"# {Path(name).name}",
        "",
        f"A LoRA adapter for `{result.base_model}`, trained for {kind} with "
        "[adarank-fast](https://arxiv.org/abs/2408.09015).",
        "",
        f"- Data: {', '.join(result.data)} ({result.examples:,} training examples, {result.form})",
        *([f"- Classes ({len(result.classes)}): {classes}"] if result.classes else []),
        f"- Ranks: {min(used)} to {max(used)}, {sum(used) / len(result.ranks):.3g} on average over "
        f"{len(result.ranks)} modules; {result.parameters:,} parameters (`plan.json`)",
        f"- Training: {result.steps:,} steps; settings in `{RECORD}`",
        "",
        f"On {result.measured_on}:",
        "",
        "| metric | before | after |",
        "|---|---|---|",
        *rows,
        "",
        "## Use",
        "",
        "```python",
        *_loading(result, name),
        *_using(result),
        "```",
        "",
        f"As one model without PEFT, after `adarank merge {result.base_model} {name} -o {merged}`:",
        "",
        "```python",
        *_loading_merged(result, merged),
        *_using(result),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(result: Result) -> list[str]:
    text = "classification" if result.task == "classification" else "generation"
    lines = ["---", "library_name: peft", f"pipeline_tag: text-{text}"]
    if not os.path.exists(result.base_model):  # else it is no name on the hub
        lines.append(f"base_model: {result.base_model}")
    return [*lines, "tags:", "- lora", "- adarank-fast", "---", ""]


def _loading(result: Result, name: str) -> list[str]:
    if result.task != "classification":
        return [
            "import torch",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({_quoted(name)})",
            f"base = AutoModelForCausalLM.from_pretrained({_quoted(result.base_model)})",
            f"model = PeftModel.from_pretrained(base, {_quoted(name)}).eval()",
        ]
    other = ", ignore_mismatched_sizes=True" if result.other_head else ""
    return [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(name)})",
        f"config = AutoConfig.from_pretrained({_quoted(name)})  # base model's, with classes",
        "classifier = AutoModelForSequenceClassification",
        f"base = classifier.from_pretrained({_quoted(result.base_model)}, config=config{other})",
        f"model = PeftModel.from_pretrained(base, {_quoted(name)}).eval()",
    ]


def _loading_merged(result: Result, name: str) -> list[str]:
    kind = "SequenceClassification" if result.task == "classification" else "CausalLM"
    return [
        "import torch",
        f"from transformers import AutoModelFor{kind}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(name)})",
        f"model = AutoModelFor{kind}.from_pretrained({_quoted(name)}).eval()",
    ]


def _using(result: Result) -> list[str]:
    if result.task == "classification":
        length = result.settings.get("max_length", 128)
        return [
            "",
            'texts = ["A text to classify.", "Another one."]',
            "inputs = tokenizer(",
            f'    texts, padding=True, truncation=True, max_length={length}, return_tensors="pt"',
            ")",
            "with torch.inference_mode():",
            '    logits = model(inputs["input_ids"], inputs["attention_mask"]).logits',
            "for text, probabilities in zip(texts, logits.softmax(-1)):",
            "    number = int(probabilities.argmax())",
            "    print(text, model.config.id2label[number], float(probabilities[number]))",
        ]
    if result.form == "chat":
        text = [
            'messages = [{"role": "user", "content": "A question."}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        text = ['inputs = tokenizer("A prompt", return_tensors="pt")']
    return [
        "",
        *text,
        "output = model.generate(",
        '    input_ids=inputs["input_ids"],',
        '    attention_mask=inputs["attention_mask"],',
        f"    max_new_tokens={GENERATED},",
        ")",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _shown(value: float) -> str:
    return f"{value:.4g}"
