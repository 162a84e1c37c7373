"""Writing files: whole or not at all, links and permissions kept, nothing of others touched."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from adarank_fast import file_system, files
from adarank_fast.errors import AdarankError
from adarank_fast.file_system import alone_in
from adarank_fast.files import (
    MARK,
    check_file,
    check_own_folder,
    lock_file,
    new_folder,
    note_settings,
    own_folder,
    remove_folder,
    replacing,
    write_text,
)


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(KeyError):
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError
    assert not os.listdir(tmp_path)
    write_text(path, "whole")
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["file"]


def test_links_and_permissions_are_kept(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert os.listdir(tmp_path / "there") == ["file"]
    (tmp_path / "folder").mkdir(mode=0o700)
    with new_folder(tmp_path / "folder"):
        pass
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700


def test_a_link_to_nothing_makes_its_target(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize(
    "path, error, message",
    [
        (".", ValueError, "is a folder"),
        (os.devnull, ValueError, "is no regular file"),
        ("fifo", ValueError, "is no regular file"),
        ("socket", ValueError, "is no regular file"),
        ("loop", ValueError, "is no regular file"),
        ("no/file", FileNotFoundError, "its folder does not exist"),
        ("x" * 300, OSError, "File name too long"),
    ],
)
@pytest.mark.parametrize("write", [lambda path: write_text(path, "x"), lock_file])
def test_what_is_refused(tmp_path, monkeypatch, path, error, message, write):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        before = names(tmp_path)
        with pytest.raises(error, match=f"cannot write '{path}': .*{message}") as raised:
            write(path)
    assert isinstance(raised.value, AdarankError) and "\n" not in str(raised.value)
    assert names(tmp_path) == before


def enter(block):
    with block as value:
        return value


def test_an_input_is_never_replaced(tmp_path):
    data, model, folder = tmp_path / "data", tmp_path / "model", tmp_path / "folder"
    model.mkdir()
    data.write_text("texts")
    (model / "config.json").write_text("{}")
    (tmp_path / "symbolic").symlink_to(data)
    os.link(data, tmp_path / "hard")
    for output in (data, tmp_path / "symbolic", tmp_path / "hard", model / "config.json"):
        with pytest.raises(ValueError, match="is read from there; name another"):
            check_file(output, [data, model, "name/on-the-hub"])
    check_file(tmp_path / "other", [data, model])
    with own_folder(folder, "comparison"):
        os.link(data, folder / "results.json")
    with pytest.raises(ValueError, match="is read from there; name another"):
        with own_folder(folder, "comparison", [data]):
            pass


def test_new_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()  # an empty one is as good as none
    with new_folder(folder) as temporary:
        (temporary / "a").write_text("")
        assert not os.listdir(folder)
    assert os.listdir(folder) == ["a"]
    for replace, message in (("", "is not empty; name a new one"), ("adapter", "did not make it")):
        with pytest.raises(ValueError, match=message):
            with new_folder(folder, replace):
                pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        with new_folder(tmp_path / "file", "adapter"):
            pass
    assert names(tmp_path) == ["file", "folder"] and names(folder) == ["a"]


def test_a_new_folder_is_written_without_waiting_for_its_own_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(file_system, "PATIENCE", 0)
    with new_folder(tmp_path / "made") as folder:
        with alone_in(folder) as alone:
            assert alone
        opened = os.open(folder, os.O_RDONLY)
        assert file_system.lock(opened) is False  # as another process sees it
        os.close(opened)


def test_a_folder_of_ours_is_replaced_unless_something_was_added(tmp_path):
    folder = tmp_path / "folder"
    for name in ("a", "b"):
        with new_folder(folder, "adapter") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).write_text("")
    assert names(folder / "sub") == ["b"]
    with pytest.raises(KeyError):
        with new_folder(folder, "adapter"):
            raise KeyError
    with pytest.raises(ValueError, match=r"is of another kind \(adapter, not comparison\)"):
        check_own_folder(folder, "comparison")
    (folder / "sub" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="holds 'sub/notes' beside the adapter"):
        with new_folder(folder, "adapter"):
            pass
    assert names(folder / "sub") == ["b", "notes"] and names(tmp_path) == ["folder"]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    with new_folder(folder, "adapter") as temporary:
        (temporary / "a").write_text("")

    def failing(source, target, replace=os.replace):
        if "b" in os.listdir(source):
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        with new_folder(folder, "adapter") as temporary:
            (temporary / "b").write_text("")
    assert os.listdir(tmp_path) == ["folder"] and names(folder) == [MARK, "a"]


def test_own_folder(tmp_path):
    folder = tmp_path / "new" / "folder"
    check_own_folder(folder, "comparison")
    assert not names(tmp_path)
    for _ in range(2):
        with own_folder(folder, "comparison") as mine:
            (mine / "a").write_text("")
    with pytest.raises(ValueError, match="is of another kind"):
        with own_folder(folder, "training"):
            pass
    (tmp_path / "link").symlink_to(folder)
    with own_folder(tmp_path / "link", "comparison") as mine:
        assert mine == folder


@pytest.mark.parametrize("room", [0, 9])
def test_a_mark_that_was_cut_off_is_written_anew(tmp_path, monkeypatch, room):
    """A disk that is full writes a part of it, and says so by a number."""
    left, write = room, os.write

    def full(opened, data):
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "no space")
        written = write(opened, data[:left])
        left -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(AdarankError, match="No space left"):
            with own_folder(tmp_path / "own", "comparison"):
                pytest.fail("without a mark")
    for _ in range(2):
        with own_folder(tmp_path / "own", "comparison") as mine:
            (mine / "a").write_text("")


@pytest.mark.parametrize(
    "content",
    [{"notes": "mine"}, {"settings.json": "{}"}, {MARK: "{}", "a": ""}, {MARK: "", "a": ""}],
)
def test_a_folder_of_others_is_refused(tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="is not empty and adarank-fast did not make it"):
        with own_folder(tmp_path, "comparison"):
            pass
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == content


@contextlib.contextmanager
def locked(path):
    opened = lock_file(path)
    yield opened
    os.close(opened)


def test_one_run_at_a_time(tmp_path):
    for take in (lambda: own_folder(tmp_path / "folder", "x"), lambda: locked(tmp_path / "c")):
        with take():
            with pytest.raises(ValueError, match="is in use by another run; wait for it or name"):
                enter(take())
        enter(take())
    with own_folder(tmp_path / "folder", "x") as folder:
        remove_folder(folder)
    assert names(tmp_path) == ["c"]


def test_a_killed_process_leaves_no_lock_and_what_it_left_is_swept_up(tmp_path):
    code = """
import os, signal, sys
from adarank_fast.files import new_folder, own_folder, replacing
folder = sys.argv[1]
with own_folder(folder + "/own", "x"), replacing(folder + "/file") as one:
    with new_folder(folder + "/new", "x") as other:
        (other / "half").write_text("half")
        one.write_text("half")
        print(len(os.listdir(folder)), flush=True)
        signal.pause()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "3\n"
        write_text(tmp_path / "file", "whole")  # leaves what is in use alone
        assert len(names(tmp_path)) == 4
        with pytest.raises(ValueError, match="is in use by another run"):
            enter(own_folder(tmp_path / "own", "x"))
        process.send_signal(signal.SIGKILL)
    enter(own_folder(tmp_path / "own", "x"))
    write_text(tmp_path / "file", "whole")
    enter(new_folder(tmp_path / "new", "x"))
    assert names(tmp_path) == ["file", "new", "own"]


def test_a_folder_that_was_moved_away_when_its_writer_was_killed_comes_back(tmp_path):
    enter(new_folder(tmp_path / "new", "x"))
    os.rename(tmp_path / "new", tmp_path / ".new.01234567.old")
    with pytest.raises(KeyError):
        with new_folder(tmp_path / "new", "x"):
            raise KeyError
    assert names(tmp_path) == ["new"]


def test_without_locks_work_goes_on(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / ".file.01234567.tmp").write_text("maybe in use")
    with own_folder(tmp_path / "folder", "x"), own_folder(tmp_path / "folder", "x"):
        write_text(tmp_path / "file", "whole")
    assert names(tmp_path) == [".file.01234567.tmp", "file", "folder"]


def test_settings_of_another_run(tmp_path):
    date = note_settings(tmp_path, {"rank": 2, "rates": (1, 2)}, "a run", "delete it")
    assert note_settings(tmp_path, {"rank": 2, "rates": (1, 2)}, "a run", "delete it") == date
    with pytest.raises(ValueError, match="holds a run with rank = 2, now 3; delete it"):
        note_settings(tmp_path, {"rank": 3, "rates": (1, 2)}, "a run", "delete it")
    for damage in ("{", "[1]"):
        (tmp_path / "settings.json").write_text(damage)
        with pytest.raises(ValueError, match="is damaged; delete it"):
            note_settings(tmp_path, {"rank": 3}, "a run", "delete it")
    note = json.dumps({"rank": 2})
    (tmp_path / "settings.json").write_text(note)
    assert note_settings(tmp_path, {"rank": 2}, "a run", "delete it") == ""


def test_many_writers_at_once(tmp_path):
    def work(number):
        refused = 0
        for turn in range(20):
            try:
                with own_folder(tmp_path / "own" / "deep", "x") as folder:
                    with open(folder / "holder", "x"):  # fails if there are two
                        time.sleep(0.001)
                    (folder / "holder").unlink()
                    if turn % 3 == number % 3:
                        remove_folder(folder)
            except AdarankError as error:
                assert "is in use by another run" in str(error)
                refused += 1
            write_text(tmp_path / "file", "whole")
            with new_folder(tmp_path / "new", "adapter") as temporary:
                (temporary / "a").write_text("whole")
        return refused

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) < 80
    assert names(tmp_path) == ["file", "new", "own"] and names(tmp_path / "new") == [MARK, "a"]


def test_an_exception_between_making_and_locking_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(opened):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "kept_locked", interrupted)
        for write in (lambda path: files.write_text(path, "x"), named_folder):
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path / "out")
            assert os.listdir(tmp_path) == []
    files.write_text(tmp_path / "out", "x")


def named_folder(path):
    with files.new_folder(path) as folder:
        (folder / "x").write_text("x")
