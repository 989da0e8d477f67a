"""Locks on files: one process at a time. The system releases a lock when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from gridcap.common.errors import GridcapError

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems have no locks


@contextlib.contextmanager
def exclusive_lock(path: Path, conflict: GridcapError | None = None) -> Iterator[None]:
    """Hold a lock for the duration of the block.

    Args:
        path: lock file; created, and removed at the end.
        conflict: error to raise if another process holds the lock; None waits for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, conflict)
            if _is_same_file(descriptor, path):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, conflict: GridcapError | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if conflict is None else fcntl.LOCK_NB))
    except BlockingIOError as error:
        assert conflict is not None
        raise conflict from error
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Return whether a locked file still has its name: its previous owner may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
