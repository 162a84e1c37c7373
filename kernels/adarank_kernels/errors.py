"""What this project refuses: one class to catch. No torch here.

A message is one line that names the argument, its value and what to do. Where another class than
ValueError is usual, the error is that one too.
"""


class AdarankError(ValueError):
    """Something that the caller can put right; everything else that is raised is a bug."""


class AdarankTypeError(AdarankError, TypeError):
    """An argument of the wrong type."""


class AdarankFileNotFoundError(AdarankError, FileNotFoundError):
    """A file or folder that is not there."""


class AdarankPermissionError(AdarankError, PermissionError):
    """A folder that cannot be written."""


class AdarankOSError(AdarankError, OSError):
    """A file that cannot be written, as on a full disk."""


class AdarankTimeoutError(AdarankError, TimeoutError):
    """The given time was over too early."""


class AdarankImportError(AdarankError, ImportError):
    """A package that is not installed."""


class AdarankRuntimeError(AdarankError, RuntimeError):
    """Work that was begun and cannot be finished as asked."""
