"""The errors a user meets: one line what, one line what to do next.

Exit statuses of every command: 0 success, 1 a failure, 2 a mistake in what the user asked for,
3 done but some images were rejected, 130 interrupted by Ctrl-C, 143 by SIGTERM, 140 by SIGUSR2.
"""

from __future__ import annotations

import errno
from pathlib import Path

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INVALID = 3
EXIT_INTERRUPTED = 130


class GridcapError(Exception):
    """An error with a message made for the user.

    Args:
        message: one line that names the file or option and says what is wrong.
        hint: one line that says what to do next.
    """

    exit_status = EXIT_FAILURE

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(GridcapError):
    """The user asked for something that cannot be: a wrong path, option, file or combination."""

    exit_status = EXIT_USAGE


class ConfigError(UserError):
    """The configuration holds an unknown key, a bad value or a contradiction."""


class AnnotationError(UserError):
    """A captions file cannot be read, or too much of it is bad."""


class StoreError(UserError):
    """A feature store is missing, incomplete, damaged or of another format."""


class MismatchError(UserError):
    """Two things that must belong together do not: features and checkpoint, plan and request."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another format."""


class WeightsError(UserError):
    """Encoder weights cannot be had or are not what they should be."""


class ExtractionError(GridcapError):
    """Extraction stopped: too many bad images, or a value that the stored type cannot hold."""


class DownloadError(GridcapError):
    """A download broke off, or brought something else than it should."""


class TrainingError(GridcapError):
    """Training stopped: the loss is not a number."""


_OS_HINTS = {
    errno.ENOSPC: "free some space (or choose another --output), then run the same command again",
    errno.EDQUOT: "your quota is used up: free some space, then run the same command again",
    errno.EACCES: "check the permissions, or choose another --output",
    errno.EPERM: "check the permissions, or choose another --output",
    errno.EROFS: "the file system is read-only: choose another --output",
    errno.ENOENT: "check the path for a typing error",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.EEXIST: "a file stands where a folder is needed: choose another path",
    errno.EISDIR: "a file is needed here, and this is a folder",
}


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def os_reason(error: OSError) -> str:
    """What the operating system says, as it stands in the middle of a sentence."""
    return (error.strerror or str(error)).lower()


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def from_os_error(error: OSError) -> GridcapError:
    """Turn an operating-system error into one with a path and a next step."""
    where = f"{error.filename}: " if error.filename else ""
    what = f"{where}{error.strerror or error}"
    if error.errno == errno.EEXIST and error.filename and _leads_nowhere(Path(error.filename)):
        return GridcapError(
            f"{where}a link to {Path(error.filename).readlink()}, which is not there",
            "make what the link leads to, or choose another path",
        )
    return GridcapError(what, _OS_HINTS.get(error.errno or 0, "run again with --debug to see where it happened"))
