"""What a command loads, and what it judges before it loads anything."""

from __future__ import annotations

import os
import subprocess
import sys

import adarank_fast as ada

NOT_LOADED = {
    "average rank": ["--average-rank", "0"],
    "budgets": ["--average-rank", "1", "--budget-parameters", "9"],
    "metric": ["--metric", "l3"],
    "allocation": ["--allocation", "best"],
    "dtype": ["--dtype", "int3"],
    "trials": ["--trials", "-1"],
    "output": ["--output", "hiden"],
    "misspelt": ["--averge-rank", "1"],
}
NOT_LOADED = {name: ["predict", "x", "--data", "y", *more] for name, more in NOT_LOADED.items()}
NOT_LOADED |= {
    f"compare {option}": ["compare", "x", "--data", "y", option, value]
    for option, value in {
        "--arms": "best",
        "--plan": "no.json",
        "--seeds": "0",
        "--average-rank": "0",
        "--task": "parsing",
        "--metric": "no:metric",
        "--learning-rates": "1,1",
        "--epochs": "0",
        "--scaling": "big",
        "--trials": "0",
        "--dtype": "int3",
        "--epoch": "1",
        "-o": "/dev/null/report",
    }.items()
} | {
    f"train {options}": ["train", "x", "--data", "y", *options.split()]
    for options in (
        "--average-rank 0",
        "--rank 2 --average-rank 3",
        "--seed 4294967296",
        "--scaling big",
        "--early-stopping 2",
        "--dtype int3",
    )
}


def test_bad_options_are_judged_before_torch_is_loaded():
    code = (
        "import sys, adarank_fast.cli.main as cli\n"
        f"for arguments in {list(NOT_LOADED.values())!r}:\n"
        "    try: cli.main(arguments)\n"
        "    except SystemExit as done: print(done.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n" * len(NOT_LOADED)
    assert done.stderr.count("\n") == len(NOT_LOADED)
    assert "y" not in [word.strip("'") for word in done.stderr.split()]  # nor is the file read


def test_importing_the_command_line_loads_nothing_heavy():
    code = (
        "import sys, importlib.util, types\n"
        "package = types.ModuleType('adarank_fast')\n"  # its own __init__ is not the matter here
        "package.__path__ = [sys.argv[1]]\n"
        "sys.modules['adarank_fast'] = package\n"
        "import adarank_fast.cli.main\n"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    folder = os.path.dirname(ada.__file__)
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
