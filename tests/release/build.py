"""Build the sdist and the wheel twice, apart in place and time, to the same bytes.

    python -m tests.release.build build/release

Of the tracked files as they are. The time within is SOURCE_DATE_EPOCH, else that of the last
commit. Anyone who builds a commit with the same setuptools gets the same hashes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def git(*command: str) -> str:
    return subprocess.run(
        ["git", *command], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def python_build(kind: str, source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", folder]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"python -m build --{kind}: status {done.returncode}\n{done.stdout[-2000:]}")
    (made,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def repack(sdist: Path, time: int) -> None:
    """In place: sorted, owned by nobody, all of one time, modes as git has them.

    setuptools heeds SOURCE_DATE_EPOCH in wheels only.
    """
    with tarfile.open(sdist) as made:
        members = sorted(made.getmembers(), key=lambda member: member.name)
        contents = [made.extractfile(m).read() if m.isfile() else b"" for m in members]  # type: ignore[union-attr]
    packed = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", fileobj=packed, mtime=time) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as archive,
    ):
        for member, content in zip(members, contents, strict=True):
            info = tarfile.TarInfo(member.name)
            info.type, info.size, info.mtime = member.type, len(content), time
            info.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            archive.addfile(info, io.BytesIO(content))
    sdist.write_bytes(packed.getvalue())


def build(folder: Path, time: int) -> list[Path]:
    """[sdist, wheel] in `folder`; the wheel is made of the sdist."""
    with tempfile.TemporaryDirectory() as name:
        source, unpacked = Path(name, "source"), Path(name, "unpacked")
        for file in git("ls-files", "-z").strip("\0").split("\0"):
            # not one that was removed and is not yet committed; src/ holds links
            if (ROOT / file).is_file() or (ROOT / file).is_symlink():
                (source / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, source / file, follow_symlinks=False)
        sdist = python_build("sdist", source, folder)
        repack(sdist, time)
        with tarfile.open(sdist) as archive:
            archive.extractall(unpacked, filter="data")
        (source,) = unpacked.iterdir()
        return [sdist, python_build("wheel", source, folder)]


def main() -> None:
    os.umask(0o022)
    time = int(os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct"))
    os.environ["SOURCE_DATE_EPOCH"] = str(time)
    first = build(Path(sys.argv[1]).resolve(), time)
    with tempfile.TemporaryDirectory() as name:
        second = build(Path(name), time)
        for one, other in zip(first, second, strict=True):
            if one.read_bytes() != other.read_bytes():
                sys.exit(f"{one.name}: two builds differ")
            print(f"{hashlib.sha256(one.read_bytes()).hexdigest()}  {one.name}, built twice")


if __name__ == "__main__":
    main()
