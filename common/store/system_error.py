"""Errors of the operating system while a store is read, as store errors with a remedy.

A system error says nothing about the content of a file. Only a failed checksum or format check is corruption.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from gridcap.common.errors import StoreAccessError, StoreError
from gridcap.common.open_files import open_file_limit

_INTACT = "the file itself may be intact: do not delete it"
_HINTS = {
    errno.EACCES: "check the permissions of the file and of its folders",
    errno.EPERM: "check the permissions of the file and of its folders",
    errno.EIO: f"check the disk and the system log, then run the command again; {_INTACT}",
    errno.ESTALE: f"the network file system replaced the file: run the command again; {_INTACT}",
    errno.ENOTDIR: "a part of the path is a file, not a folder: check the path",
    errno.ELOOP: "a link points to itself: fix the link",
}


def store_error_from(error: OSError, path: Path) -> StoreError:
    """Convert an operating-system error to an error that names the file, the cause, and the remedy.

    Args:
        error: raised while `path` was opened or read.
        path: the file.

    Returns:
        A StoreError for a missing file or a folder, a StoreAccessError otherwise.
    """
    if error.errno == errno.ENOENT:
        if path.is_symlink():
            return StoreError(f"{path}: broken link to {path.readlink()}", "restore the target or fix the link")
        return StoreError(f"{path}: no such file", "check the path, or create the store with extract-features")
    if error.errno == errno.EISDIR:
        hint = "choose another name" if path.suffix == ".h5" else f"pass the index file, {path}.h5"
        return StoreError(f"{path}: is a folder", hint)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return StoreAccessError(
            f"{path}: too many open files (limit: {open_file_limit()})",
            f"raise the limit of open files, for example with `ulimit -n 4096`; {_INTACT}",
        )
    cause = (os.strerror(error.errno) if error.errno else str(error)).lower()
    return StoreAccessError(f"{path}: {cause}", _HINTS.get(error.errno or 0, f"run the command again; {_INTACT}"))
