"""Positional reads from a file that must not change, and the lock that guards the opening of files."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from gridcap.common.errors import StoreError
from gridcap.common.store.system_error import store_error_from


class PinnedFile:
    """File read by position from any number of threads.

    The file is opened on the first read, and again on the first read after `close` or unpickling. It must be the same
    file each time (inode, size, and modification time). It is closed when the object is garbage collected.

    Args:
        path: the file.

    Attributes:
        size: size in bytes.

    Raises:
        StoreError: the file does not exist.
        StoreAccessError: the system could not access the file.
    """

    _descriptor: int | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = path.stat()
        except OSError as error:  # for example, another worker has just removed it
            raise store_error_from(error, path) from error
        self.size = status.st_size
        self._identity = self._identity_of(status)

    @staticmethod
    def _identity_of(status: os.stat_result) -> tuple[int, int, int]:
        return status.st_ino, status.st_size, status.st_mtime_ns

    def read_into(self, buffer: memoryview, position: int) -> bool:
        """Fill a buffer with the bytes from `position` on.

        Returns:
            False if the file ends before the buffer is full.

        Raises:
            StoreError: the file was replaced or changed since it was opened first.
            StoreAccessError: the system could not open or read the file.
        """
        descriptor = self._descriptor
        try:
            if descriptor is None:
                with open_lock():
                    if self._descriptor is None:
                        self._descriptor = self._open()
                    descriptor = self._descriptor
            while buffer:
                count = os.preadv(descriptor, [buffer], position)
                if count == len(buffer):  # the usual case, about 100,000 times per second
                    return True
                if count == 0:
                    return False
                position, buffer = position + count, buffer[count:]
        except OSError as error:
            raise store_error_from(error, self.path) from error
        return True

    def _open(self) -> int:
        descriptor = os.open(self.path, os.O_RDONLY)
        if self._identity_of(os.fstat(descriptor)) != self._identity:
            os.close(descriptor)
            raise StoreError(f"{self.path}: replaced or changed while it was in use", "run the command again")
        return descriptor

    def close(self) -> None:
        """Close the file. The next read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}


_open_lock = threading.Lock()


def open_lock() -> threading.Lock:
    """Return the lock that a reader holds while it opens its file. It is recreated after a fork."""
    return _open_lock


def _recreate_lock() -> None:
    global _open_lock
    _open_lock = threading.Lock()


# The thread that held the lock at the time of the fork does not exist in the child process.
os.register_at_fork(after_in_child=_recreate_lock)
