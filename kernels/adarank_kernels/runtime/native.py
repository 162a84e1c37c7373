"""Builds C at run time: once a process, in a temporary folder.

Nothing stays that another machine or user could load. No C compiler: None, and torch's form runs.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


def build(name: str, source: str, *options: str) -> ctypes.CDLL | None:
    """`source` as a loaded library, in a temporary folder; None where it cannot be built."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="adarank-") as folder:
            code, built = Path(folder, f"{name}.c"), Path(folder, f"{name}.so")
            code.write_text(source)
            flags = ["-std=gnu11", "-O3", "-march=native", "-shared", "-fPIC", "-o", str(built)]
            subprocess.run(
                [compiler, *flags, str(code), *options],
                check=True,
                capture_output=True,
                timeout=60,
            )
            return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("%s stays in torch: %s did not build it: %s", name, compiler, error)
        return None
