"""What shards and indexes have in common as files: a header that vouches for the rest, and being the same file still.

HDF5 leaves the first 4096 bytes of a file to us (its "user block"). There stands a line of JSON, filled up with spaces:
format, version, size, the SHA-256 of everything after it, and what else the kind of file wants known at once.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gridcap.common.errors import StoreError, os_reason

VERSION = 2
HEADER_BYTES = 4096
_HDF5 = b"\x89HDF\r\n\x1a\n"  # how HDF5 begins


def pack_header(kind: str, values: Mapping[str, Any]) -> bytes:
    """A header, HEADER_BYTES long: a line of JSON, filled up with spaces."""
    text = json.dumps({"format": kind, "version": VERSION, **values}, sort_keys=True)
    return text.encode().ljust(HEADER_BYTES - 1) + b"\n"


def unpack_header(path: Path, kind: str, keys: Collection[str], remake: str) -> dict[str, Any] | None:
    """The values of a file's header, or None if the file has none (rewritten by other tools).

    Raises:
        StoreError: missing, unreadable, damaged, or not as long as the header says.
    """
    try:
        with open(path, "rb") as file:
            block = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StoreError(f"{path}: {os_reason(error)}", remake) from error
    if not block.startswith(b"{"):
        return None
    try:
        values: dict[str, Any] = json.loads(block)
        version = values.pop("version")
        if values.pop("format") != kind or set(values) != set(keys):
            raise ValueError("other keys than a header has")
        if pack_header(kind, values) != block and version == VERSION:
            raise ValueError("not as it was written")
        size_then = int(values["size"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path}: damaged header: {error}", remake) from error
    if version != VERSION:
        raise other_version(path, version)
    if size != size_then:
        what = "truncated" if size < size_then else "was written to"
        raise StoreError(f"{path}: {what}: {size} bytes in place of {size_then}", remake)
    return values


def format_of(path: Path) -> str | None:
    """What a file's header says the file is, "" if it is damaged; None if there is none, or it cannot be read."""
    try:
        with open(path, "rb") as file:
            block, begin = file.read(HEADER_BYTES), file.read(len(_HDF5))
    except OSError:  # whoever reads on says why
        return None
    if not block.startswith(b"{") or begin != _HDF5:
        return None
    try:
        return str(json.loads(block)["format"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


class PinnedFile:
    """A file that is read by position from many threads, opened when it is first read and again after `close`.

    It must be the same file each time. The descriptor stays behind on pickling.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = self._of(path.stat())
        self._descriptor: int | None = None

    @staticmethod
    def _of(status: os.stat_result) -> tuple[int, int, int]:
        return status.st_ino, status.st_size, status.st_mtime_ns

    def read_into(self, view: memoryview, position: int) -> bool:
        """Fill `view` with the bytes from `position` on; False if the file ends before.

        Raises:
            StoreError: on opening: another file has taken its place, or it was changed.
        """
        descriptor = self._descriptor
        if descriptor is None:
            with opening():
                if self._descriptor is None:
                    self._descriptor = self._open()
                descriptor = self._descriptor
        while view:
            count = os.preadv(descriptor, [view], position)
            if count == len(view):  # as nearly always, and a hundred thousand times a second
                return True
            if count == 0:
                return False
            position, view = position + count, view[count:]
        return True

    def _open(self) -> int:
        descriptor = os.open(self.path, os.O_RDONLY)
        if self._of(os.fstat(descriptor)) != self._identity:
            os.close(descriptor)
            raise StoreError(f"{self.path}: was replaced or changed while it was in use", "start again")
        return descriptor

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}


_opening = threading.Lock()


def opening() -> threading.Lock:
    """The lock that a reader holds while it opens its file; after a fork another one."""
    return _opening


def _renew_lock() -> None:
    global _opening
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # another thread may have held it, and there it is no more


def other_version(path: Path, version: object) -> StoreError:
    """The error for a file of another version of the format."""
    older = isinstance(version, (int, np.integer)) and version < VERSION
    hint = "delete the store and extract again, or use the gridcap that made it" if older else "update gridcap"
    return StoreError(f"{path}: format version {version}, and this gridcap reads version {VERSION}", hint)
