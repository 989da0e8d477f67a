"""Exceptions of the library, and the exit statuses of the commands.

Every command exits with 0 on success, 1 on failure, 2 on a usage error, 3 if the work is done but some images are
invalid, 130 after Ctrl-C, 143 after SIGTERM, and 140 after SIGUSR2.
"""

from __future__ import annotations

import errno
from pathlib import Path

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INVALID = 3
EXIT_INTERRUPTED = 130


class GridcapError(Exception):
    """Base class of all errors that are reported to the user as a message and a hint.

    Args:
        message: one line that names the file or option and says what is wrong.
        hint: one line that says what to do.
    """

    exit_status = EXIT_FAILURE

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)  # both are in `args`, so that the exception can be pickled
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UserError(GridcapError):
    """Usage error: an option or a combination of options is wrong, whatever files exist."""

    exit_status = EXIT_USAGE


class ConfigError(UserError):
    """The configuration contains an unknown key, an invalid value, or a contradiction."""


class PathError(GridcapError):
    """A path of the command line or the configuration does not exist, or is a file instead of a folder.

    This is no usage error: a network file system may not be mounted yet, and the same command may succeed later.
    """


class AnnotationError(GridcapError):
    """A captions file cannot be read, or too many of its entries are invalid."""


class StoreError(GridcapError):
    """A feature store is missing, incomplete, corrupted, or of an unsupported format version."""


class StoreAccessError(StoreError):
    """A file of a feature store cannot be read on this system or by this version. The file itself may be intact."""


class InvalidImageError(GridcapError):
    """An image cannot be used, or the grid of an invalid image was requested from a feature store.

    Args:
        reason: why the image is invalid, in a few words.
        hint: one line that says what to do.
        path: the image, if the reason does not name it.

    Attributes:
        reason: see above; the message is "<path>: <reason>".
    """

    def __init__(self, reason: str, hint: str = "replace the image, or leave it out", path: str = "") -> None:
        super().__init__(f"{path}: {reason}" if path else reason, hint)
        self.args = (reason, hint, path)
        self.reason = reason


class ReadError(GridcapError):
    """An image file cannot be read because of the disk or the network, which says nothing about the image."""


class MismatchError(GridcapError):
    """Two things that must belong together do not, such as features and checkpoint, or plan and request."""


class CheckpointError(GridcapError):
    """A checkpoint is missing, corrupted, or of an unsupported format version."""


class WeightsError(GridcapError):
    """Encoder weights are missing, cannot be downloaded, or do not match their checksum."""


class ExtractionError(GridcapError):
    """Extraction stopped: too many invalid images, or a value that the stored dtype cannot represent."""


class DownloadError(GridcapError):
    """A download was interrupted or returned unexpected content."""


class TrainingError(GridcapError):
    """Training stopped because the loss became NaN or inf, or because the ranks cannot connect."""


class FolderInUseError(GridcapError):
    """Another process writes to the same folder."""


class OutOfMemoryError(GridcapError):
    """The system or the GPU has no memory left, or a memory limit was reached."""


_CHECK_PERMISSIONS = "check the permissions, or choose another path"
_CHECK_NETWORK = "check the network connection, then rerun the command"
_OS_HINTS = {
    errno.ENOSPC: "free some space (or choose another --output), then rerun the command",
    errno.EDQUOT: "your disk quota is used up: free some space, then rerun the command",
    errno.EACCES: _CHECK_PERMISSIONS,
    errno.EPERM: _CHECK_PERMISSIONS,
    errno.EROFS: "the file system is read-only: choose another --output",
    errno.ENOENT: "check the path for typos",
    errno.ENOTDIR: "a component of the path is a file, not a folder: choose another path",
    errno.EEXIST: "a file exists where a folder is needed: choose another path",
    errno.EISDIR: "the path is a folder, but a file is needed: choose another path",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n), then rerun the command",
    errno.ENFILE: "too many open files on this machine: close other programs, then rerun the command",
    errno.EIO: "the disk or network file system reported an error: check it (dmesg), then rerun the command",
    errno.ESTALE: "the network file system lost track of the file: check that it still exists, then rerun the command",
    errno.EHOSTUNREACH: _CHECK_NETWORK,
    errno.ENETUNREACH: _CHECK_NETWORK,
    errno.ENETDOWN: _CHECK_NETWORK,
    errno.ECONNRESET: _CHECK_NETWORK,
    errno.ECONNREFUSED: _CHECK_NETWORK,
    errno.ETIMEDOUT: _CHECK_NETWORK,
    errno.ENOMEM: "close other programs, or raise the memory limit (ulimit -v, container), then rerun the command",
}


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def os_reason(error: OSError) -> str:
    """Return the system's message in lower case, for the middle of a sentence."""
    return (error.strerror or str(error)).lower()


def from_os_error(error: OSError) -> GridcapError:
    """Convert an operating system error into an error with the path and a hint."""
    prefix = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.EEXIST and error.filename and _is_dangling_symlink(Path(error.filename)):
        return GridcapError(
            f"{prefix}symlink to {Path(error.filename).readlink()}, which does not exist",
            "create the symlink's target, or choose another path",
        )
    hint = _OS_HINTS.get(error.errno or 0, "rerun with --debug to see where it happened")
    if type(error).__module__ == "ssl":  # its error numbers are those of OpenSSL: 1 is not EPERM
        hint = _CHECK_NETWORK
    return GridcapError(f"{prefix}{error.strerror or error}", hint)


def _is_dangling_symlink(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


_GPU_HINT = "lower --batch-size, or use a GPU with more free memory (nvidia-smi shows other processes)"
_MEMORY_HINT = "lower --batch-size, close other programs, or raise the memory limit (ulimit -v, container, Slurm --mem)"
# Messages of exceptions that are raised when memory or threads run out but are not a MemoryError.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "can't start new thread",
    "failed to map segment",
    "std::bad_alloc",
    "unable to allocate",
)


def explain_out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """Return an OutOfMemoryError if an exception means that memory ran out, on the CPU or the GPU."""
    # By name: torch is not loaded here. torch.cuda.OutOfMemoryError and torch.OutOfMemoryError are the same class.
    if type(error).__name__ == "OutOfMemoryError":
        return OutOfMemoryError(f"out of GPU memory: {first_line(error)}", _GPU_HINT)
    text = str(error).lower()
    if "cuda" in text and "out of memory" in text:
        return OutOfMemoryError(f"out of GPU memory: {first_line(error)}", _GPU_HINT)
    exhausted = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if exhausted or (isinstance(error, (RuntimeError, ImportError)) and any(part in text for part in _OUT_OF_MEMORY)):
        return OutOfMemoryError(f"out of memory: {first_line(error)}", _MEMORY_HINT)
    return None
