"""Conversion of any exception into a message and a hint."""

from __future__ import annotations

import errno
import sys

from gridcap.common.errors import GridcapError, OutOfMemoryError, first_line, from_os_error

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
UTF8_HINT = "run the command with PYTHONUTF8=1, or set a UTF-8 locale, such as LC_ALL=C.UTF-8"


def explain(error: Exception) -> GridcapError:
    """Return the error to report for an exception that ended a command."""
    if isinstance(error, GridcapError):
        return error
    if memory_error := explain_out_of_memory(error):
        return memory_error
    if isinstance(error, UnicodeError):
        return GridcapError(f"text cannot be converted: {error}", UTF8_HINT)
    if isinstance(error, OSError) and error.errno is not None:
        return from_os_error(error)
    hint = "this is an internal error of gridcap: rerun with --debug and report the traceback"
    return GridcapError(f"{type(error).__name__}: {error}", hint)


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


def check_utf8_locale() -> None:
    """Raise GridcapError if file names are not encoded in UTF-8: names with accents would be stored garbled."""
    encoding = sys.getfilesystemencoding()
    if encoding.lower().replace("-", "") != "utf8":
        raise GridcapError(f"the locale encodes file names in {encoding}, not in UTF-8", UTF8_HINT)
