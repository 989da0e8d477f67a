"""The interface of features written by other programs."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pickle import UnpicklingError

import numpy as np

from gridcap.common.errors import GridcapError, first_line, from_os_error

MAX_REASON = 200  # characters of another library's message


class SourceError(GridcapError):
    """Features to import are corrupted, ambiguous, or of an unsupported shape."""


@dataclass(frozen=True)
class Source:
    """Features written by another program.

    Attributes:
        keys: one name per image, unique: a file name or an image id.
        read: key -> array of any float or integer dtype.
        kind: kind of the source, such as "folder of .npy".
        sha256: SHA-256 of the file, or of the names and contents of a folder's files.
    """

    keys: list[str]
    read: Callable[[str], np.ndarray]
    kind: str
    sha256: str


def decode_key(key: object) -> str:
    """Return a key as text: bytes are UTF-8, and a float that is an integer is written as one.

    Raises:
        ValueError: bytes that are not UTF-8.
    """
    if isinstance(key, bytes):
        return key.decode()
    if isinstance(key, float) and key.is_integer():
        return str(int(key))
    return str(key)


def unique_keys(names: Iterable[object]) -> dict[str, int]:
    """Return key -> position.

    Raises:
        ValueError: a key occurs twice, or cannot be decoded.
    """
    positions: dict[str, int] = {}
    for position, name in enumerate(names):
        key = decode_key(name)
        if key in positions:
            raise ValueError(f"the key {key!r} occurs twice, at positions {positions[key]} and {position}")
        positions[key] = position
    return positions


def raise_system_error(error: Exception, name: str) -> None:
    """Raise an error of the system, which says nothing about the content of a file; return for any other error.

    Args:
        error: raised while the file was read.
        name: name of the file, for errors that do not contain one.

    Raises:
        GridcapError: the system could not read the file; with the system's message and a hint.
        MemoryError: no memory is left.
    """
    if isinstance(error, MemoryError):
        raise error
    # EINVAL is excluded: seeking to an offset in a corrupted file can cause it.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise from_os_error(OSError(error.errno, os.strerror(error.errno), error.filename or name)) from error


def reason_of(error: Exception) -> str:
    """Return one line that describes an error of another library."""
    message = first_line(error)[:MAX_REASON]
    return (
        message if isinstance(error, (OSError, ValueError, UnpicklingError)) else f"{type(error).__name__}: {message}"
    )
