"""Conversion of any exception into a message and a hint."""

from __future__ import annotations

import sys

from gridcap.common.errors import GridcapError, explain_out_of_memory, from_os_error

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


def check_utf8_locale() -> None:
    """Raise GridcapError if file names are not encoded in UTF-8: names with accents would be stored garbled."""
    encoding = sys.getfilesystemencoding()
    if encoding.lower().replace("-", "") != "utf8":
        raise GridcapError(f"the locale encodes file names in {encoding}, not in UTF-8", UTF8_HINT)
