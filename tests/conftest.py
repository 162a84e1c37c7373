import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def adarank(capfd, monkeypatch, tmp_path):
    """Run a command in an empty folder: (exit status, stdout, stderr)."""
    from adarank_fast.cli import main as cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return exit_.value.code, out, err

    return run
