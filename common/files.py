"""Files that are written whole or not at all."""

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


_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors that come without a name from a write
_ABANDONED_AFTER = 24 * 3600  # seconds; no shard takes so long to write
_TEMPORARY_NAME = re.compile(r"\..+\.(?P<machine>[^/]+)-(?P<process>\d+)-[0-9a-f]{8}" + re.escape(TEMPORARY_SUFFIX))


def this_machine() -> str:
    """A name for the place where process numbers mean what they mean here: the host, or a container on it.

    Containers on one host may share its name and each have a process 1; their process name spaces differ.
    """
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    return f"{socket.gethostname()}-{space}"


def temporary_sibling(path: Path) -> Path:
    """A name in the same folder that no other process, on any machine, will choose."""
    return path.with_name(f".{path.name}.{this_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders that nobody writes any more.

    Those of this machine go when their process is gone; those of others, whose processes cannot be asked for, when
    they have not changed for a day.
    """
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        match = _TEMPORARY_NAME.fullmatch(path.name)
        if match and _is_abandoned(path, match["machine"], int(match["process"])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path, machine: str, process: int) -> bool:
    if machine == this_machine():
        return not _is_running(process)
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED_AFTER
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
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; what is still there at the end is removed.

    An operating-system error names `path`: a full disk names nothing, and a temporary name tells the user nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        yield temporary
    except OSError as error:
        if (error.filename is None and error.errno in _OF_DISKS) or error.filename in (str(temporary), temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(*paths: Path | None) -> None:
    """Find out before long work whether its results can be written; makes the folders that they go to.

    Args:
        paths: of the results; None for one that was not asked for.

    Raises:
        OSError: one cannot.
    """
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with temporary_file(path) as temporary:
            temporary.touch()


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a temporary file its name, on disk."""
    fsync_path(temporary)
    os.replace(temporary, path)
    fsync_path(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; when the block ends well, it takes the place of `path`, on disk.

    If the block raises, the temporary file is removed and `path` is as it was.
    """
    with temporary_file(path) as temporary:
        yield temporary
        put_in_place(temporary, path)


def publish_text(path: Path, text: str) -> bool:
    """Write a text file, whole or not at all, unless there is one: of several writers just one succeeds.

    Returns:
        Whether this call wrote it.
    """
    with temporary_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        fsync_path(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: the last of several writers wins
            os.replace(temporary, path)
        fsync_path(path.parent)
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path, start: int = 0) -> str:
    """The SHA-256 of a file's bytes from `start` on, in hexadecimal."""
    with open(path, "rb") as file:
        file.seek(start)
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
