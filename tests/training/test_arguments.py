"""Fields of TrainingArguments and SFTConfig from files, flags and text."""

from __future__ import annotations

import json

import pytest

from adarank_fast.errors import AdarankError
from adarank_fast.training.arguments import FLAGS, config_class, make_arguments, read_settings

TASKS = ("classification", "causal-lm")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "pair, value",
    [
        ("learning_rate=1e-4", 1e-4),  # text to YAML
        ("num_train_epochs=0.5", 0.5),
        ("logging_steps=7", 7),
        ("tf32=null", None),
        ("bf16=true", True),
        ("run_name=007", "007"),
        ("report_to=[tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("report_to=none", "none"),
        ("lr_scheduler_kwargs={num_cycles: 2}", {"num_cycles": 2}),
        ("max-length=12", 12),
        ("optim_args=a=1,b=2", "a=1,b=2"),
        ("trackio_static_space_id=false", False),  # text or exactly False
    ],
)
def test_values_have_the_type_of_their_field(task, pair, value):
    name = pair.partition("=")[0].replace("-", "_")
    found = read_settings(task, pairs=[pair])[name]
    assert found == value and type(found) in (type(value), float)


@pytest.mark.parametrize("task", TASKS)
def test_every_flag_is_a_field_and_the_defaults_are_accepted(task, tmp_path):
    assert set(FLAGS.values()) <= {*config_class(task).__dataclass_fields__}
    arguments = make_arguments(task, read_settings(task), tmp_path)
    assert arguments.num_train_epochs == 3 and arguments.weight_decay == 0
    assert not arguments.bf16 and not arguments.gradient_checkpointing and not arguments.report_to


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_the_file_then_flags_then_pairs(tmp_path, suffix):
    path = tmp_path / f"run.{suffix}"
    path.write_text(json.dumps({"learning_rate": 0.5, "seed": 3, "warmup_steps": 2}))
    found = read_settings("classification", path, {"seed": 4, "epochs": None}, ["warmup_steps=9"])
    assert (found["learning_rate"], found["seed"], found["warmup_steps"]) == (0.5, 4, 9)
    assert found["num_train_epochs"] == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "must be names and values"),
        ("a: [", "while parsing"),
        ("lerning_rate: 1", "did you mean 'learning_rate'?"),
        ("packing: true", "ClassificationConfig has no such field"),
        ("bf16: maybe", "bf16 takes true or false, got 'maybe'"),
        ("seed: 1.5", "seed takes an integer"),
        ("save_total_limit: some", "save_total_limit takes an integer, got 'some'"),
        ("trackio_static_space_id: true", "takes text or False"),
        ("output_dir: x", "cannot be set"),
    ],
)
def test_bad_files_are_one_line_that_names_them(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(AdarankError, match="run.yaml") as error:
        read_settings("classification", path)
    assert message in str(error.value)


def test_values_that_do_not_go_together(tmp_path):
    settings = read_settings("classification", pairs=["load_best_model_at_end=true"])
    with pytest.raises(AdarankError, match="ClassificationConfig refuses the settings"):
        make_arguments("classification", settings, tmp_path)
