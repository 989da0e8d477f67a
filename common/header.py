"""What shards and indexes have in common as files: a header that vouches for the rest, and being the same file still.

HDF5 leaves the first 4096 bytes of a file to us (its "user block"). There stands a line of JSON, filled up with spaces:
format, version, size, the SHA-256 of everything after it, and what else the kind of file wants known at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import StoreError

VERSION = 2
HEADER_BYTES = 4096


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
        raise StoreError(f"{path}: {(error.strerror or str(error)).lower()}", remake) from error
    if not block.startswith(b"{"):
        return None
    try:
        values: dict[str, Any] = json.loads(block)
        version = values.pop("version")
        if values.pop("format") != kind or set(values) != set(keys):
            raise ValueError("other keys than a header has")
        if pack_header(kind, values) != block and version == VERSION:
            raise ValueError("not as it was written")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: damaged header: {error}", remake) from error
    if version != VERSION:
        raise other_version(path, version)
    if size != values["size"]:
        raise StoreError(f"{path}: truncated: {size} bytes of {values['size']}", remake)
    return values


class KnownFile:
    """A file that is opened again and again, and must be the same file each time.

    Raises:
        StoreError: on opening: another file has taken its place, or it was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = self._of(path.stat())

    @staticmethod
    def _of(status: os.stat_result) -> tuple[int, int, int]:
        return status.st_ino, status.st_size, status.st_mtime_ns

    def open(self) -> int:
        """A descriptor for reading."""
        descriptor = os.open(self.path, os.O_RDONLY)
        if self._of(os.fstat(descriptor)) != self._identity:
            os.close(descriptor)
            raise StoreError(f"{self.path}: was replaced or changed while it was in use", "start again")
        return descriptor


def other_version(path: Path, version: object) -> StoreError:
    """The error for a file of another version of the format."""
    older = isinstance(version, (int, np.integer)) and version < VERSION
    hint = "delete the store and extract again, or use the gridcap that made it" if older else "update gridcap"
    return StoreError(f"{path}: format version {version}, and this gridcap reads version {VERSION}", hint)
