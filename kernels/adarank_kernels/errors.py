"""What this project refuses: one class to catch. No torch here.

A message is one line that names the argument, its value and what to do. Where another class than
ValueError is usual, the error is that one too.
"""


class AdarankError(ValueError):
    """Something that the caller can put right; everything else that is raised is a bug.

    The message stays one line that can be printed, whatever names and values are in it.
    """

    def __init__(self, message: object = "", *more: object) -> None:
        super().__init__(_one_line(str(message)), *more)


class AdarankTypeError(AdarankError, TypeError):
    """An argument of the wrong type: an `AdarankError` that is a TypeError, too."""


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


LONGEST = 2000  # of a message: a stranger's file may have names of any length


def _one_line(text: str) -> str:
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"
    return text if text.isprintable() else printable(" ".join(text.splitlines()))


def printable(text: str) -> str:
    """A text with escapes for what would break a line or a file, such as a newline in a name."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
