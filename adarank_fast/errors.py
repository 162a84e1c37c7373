"""The errors of both packages, for all rooms. No torch here."""

from adarank_kernels.errors import (
    AdarankError,
    AdarankFileNotFoundError,
    AdarankImportError,
    AdarankOSError,
    AdarankPermissionError,
    AdarankRuntimeError,
    AdarankTimeoutError,
    AdarankTypeError,
    printable,
)

__all__ = [
    "AdarankError",
    "AdarankFileNotFoundError",
    "AdarankImportError",
    "AdarankOSError",
    "AdarankPermissionError",
    "AdarankRuntimeError",
    "AdarankTimeoutError",
    "AdarankTypeError",
    "printable",
]
