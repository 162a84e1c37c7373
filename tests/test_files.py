"""Writing files: whole or not at all, links and permissions kept, nothing odd overwritten."""

from __future__ import annotations

import os
import stat

import pytest

from adarank_fast.files import new_folder, note_settings, replacing, write_text


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


def test_a_link_to_nothing_makes_its_target(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize(
    "path, error, message",
    [
        (".", ValueError, "is a folder"),
        (os.devnull, ValueError, "is no regular file"),
        ("no/file", FileNotFoundError, "its folder does not exist"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, path, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=f"cannot write '{path}': .*{message}") as raised:
        write_text(path, "x")
    assert "\n" not in str(raised.value)
    assert not os.listdir(tmp_path)


def test_new_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()  # an empty one is as good as none
    with new_folder(folder) as temporary:
        (temporary / "a").write_text("")
        assert not os.listdir(folder)
    assert os.listdir(folder) == ["a"]
    with pytest.raises(ValueError, match="is not empty; name a new one"):
        with new_folder(folder):
            pass
    with pytest.raises(KeyError):
        with new_folder(folder, replace=True) as temporary:
            raise KeyError
    assert os.listdir(folder) == ["a"]
    with new_folder(folder, replace=True) as temporary:
        (temporary / "b").write_text("")
    assert os.listdir(folder) == ["b"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        with new_folder(tmp_path / "file", replace=True):
            pass
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("")

    def failing(source, target, replace=os.replace):
        if list(os.listdir(source)) == ["b"]:
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        with new_folder(folder, replace=True) as temporary:
            (temporary / "b").write_text("")
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(folder) == ["a"]


def test_settings_of_another_run(tmp_path):
    date = note_settings(tmp_path, {"rank": 2, "rates": (1, 2)}, "a run", "delete it")
    assert note_settings(tmp_path, {"rank": 2, "rates": (1, 2)}, "a run", "delete it") == date
    with pytest.raises(ValueError, match="holds a run with rank = 2, now 3; delete it"):
        note_settings(tmp_path, {"rank": 3, "rates": (1, 2)}, "a run", "delete it")
