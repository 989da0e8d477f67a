"""Repeated reading of files after errors that may pass, such as those of a network file system."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from gridcap.common.errors import ReadError, first_line, from_os_error, os_reason
from gridcap.common.text import plural

ATTEMPTS = 5
DELAY = 0.5  # seconds before the first retry; doubled before each further one
TRANSIENT_ERRORS = frozenset(
    (
        errno.EAGAIN,
        errno.EINTR,
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ENOTCONN,
        errno.EREMOTEIO if hasattr(errno, "EREMOTEIO") else errno.EIO,
    )
)
NETWORK_LIBRARIES = frozenset(("aiohttp", "botocore", "http", "requests", "ssl", "urllib3"))
TRANSIENT_STATUS = frozenset((408, 425, 429))  # HTTP; and all from 500 on

T = TypeVar("T")


def is_transient(error: BaseException) -> bool:
    """Return whether a read error may pass: one of the network or the storage, not of the file.

    Errors of network libraries are recognized by their module, because the libraries are optional.
    """
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRORS:
        return True
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if not NETWORK_LIBRARIES.intersection(kind.__module__.partition(".")[0] for kind in type(error).__mro__):
        return False
    status = getattr(error, "status", None)
    return not isinstance(status, int) or status >= 500 or status in TRANSIENT_STATUS


def retry_transient_errors(read: Callable[[], T], path: str) -> T:
    """Call `read`, repeatedly if it fails with an error that may pass.

    Args:
        read: reads the file.
        path: name for errors that do not contain one.

    Raises:
        ReadError: the error persists; names the file and the system's error.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return read()
        except Exception as error:
            transient = is_transient(error)
            if not transient and not isinstance(error, OSError):
                raise
            if not transient or attempt == ATTEMPTS:
                raise _describe(error, path, attempt if transient else None) from error
            time.sleep(DELAY * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _describe(error: Exception, path: str, attempts: int | None) -> ReadError:
    reason, hint, name = first_line(error), "", None
    if isinstance(error, OSError):
        reason, hint, name = os_reason(error), from_os_error(error).hint, error.filename
    if attempts is not None:
        reason += f" ({plural(attempts, 'attempt')})"
        hint = "check the disk or the network share of the images, then rerun the command"
    return ReadError(f"{name or path}: cannot be read: {reason}", hint)
