"""Atomic file writes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".tmp"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # write errors that do not name the file
MAX_NAME_BYTES = 255  # of most file systems
MAX_TEMPORARY_AGE = 24 * 3600  # seconds; writing one shard takes far less
TEMPORARY_NAME = re.compile(r"\..+\.(?P<machine>[^/]+)-(?P<process>\d+)-[0-9a-f]{8}" + re.escape(TEMPORARY_SUFFIX))


def this_machine() -> str:
    """Return a name for the PID namespace of this process: the host, or a container on it.

    Containers may share the name of their host, and each has its own process 1.
    """
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}-{namespace}"


def temporary_sibling(path: Path) -> Path:
    """Return a name in the same folder that is unique across processes and machines. Long names are shortened."""
    suffix = f".{this_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}"
    name = os.fsdecode(os.fsencode(path.name)[: MAX_NAME_BYTES - 1 - len(suffix)])
    return path.with_name(f".{name}{suffix}")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders whose writer is gone.

    On this machine, the process must have ended. Processes of other machines cannot be checked, so their files must
    not have changed for a day.
    """
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        match = TEMPORARY_NAME.fullmatch(path.name)
        if match and _is_abandoned(path, match["machine"], int(match["process"])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path, machine: str, process: int) -> bool:
    if machine == this_machine():
        return not _is_running(process)
    try:
        return time.time() - path.stat().st_mtime > MAX_TEMPORARY_AGE
    except FileNotFoundError:
        return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the folder of `path`. The file is removed at the end if it still exists.

    Operating system errors name `path`: a full disk names no file, and the temporary name means nothing to users.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        yield temporary
    except OSError as error:
        if (error.filename is None and error.errno in DISK_ERRORS) or error.filename in (str(temporary), temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(*paths: Path | None) -> None:
    """Check before long work that its results can be written. Missing parent folders are created.

    Args:
        paths: paths of the results; None for results that were not requested.

    Raises:
        OSError: a result cannot be written.
    """
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with temporary_file(path) as temporary:
            temporary.touch()


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a temporary file to its final name, durably: fsync, rename, fsync the folder."""
    fsync_path(temporary)
    os.replace(temporary, path)
    fsync_path(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to. It replaces `path` durably when the block ends.

    If the block raises, the temporary file is removed and `path` is unchanged.
    """
    with temporary_file(path) as temporary:
        yield temporary
        put_in_place(temporary, path)


def publish_text(path: Path, text: str) -> bool:
    """Write a text file atomically unless it exists.

    Of several concurrent writers, exactly one succeeds if the file system supports hard links.

    Returns:
        Whether this call wrote the file.
    """
    with temporary_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        fsync_path(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # no hard links on this file system: of several concurrent writers, the last one wins
            if path.exists():
                return False
            os.replace(temporary, path)
        fsync_path(path.parent)
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path, start: int = 0) -> str:
    """Return the SHA-256 of a file from byte `start` on, in hexadecimal."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))  # fits in a core's cache
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
