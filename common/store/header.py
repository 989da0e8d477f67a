"""Checksummed file header of shards and indexes.

HDF5 leaves the first 4096 bytes of a file to the application (the "user block"). They contain one line of JSON, padded
with spaces: format, version, file size, SHA-256 of everything after the header, and a few keys of each format. A file
that another program rewrote has no header; it is read without this check.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gridcap.common.errors import StoreAccessError, StoreError
from gridcap.common.store.system_error import store_error_from

FORMAT_VERSION = 3
HEADER_BYTES = 4096
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def pack_header(kind: str, values: Mapping[str, Any]) -> bytes:
    """Return a header of HEADER_BYTES bytes.

    Args:
        kind: file format, such as "gridcap-shard".
        values: further keys.
    """
    text = json.dumps({"format": kind, "version": FORMAT_VERSION, **values}, sort_keys=True)
    return text.encode().ljust(HEADER_BYTES - 1) + b"\n"


def unpack_header(path: Path, kind: str, keys: Collection[str], hint: str) -> dict[str, Any] | None:
    """Read and check the header of a file.

    Args:
        path: the file.
        kind: expected file format.
        keys: expected keys besides "format" and "version".
        hint: what to do if the file is corrupted.

    Returns:
        The values of `keys`, or None if the file has no header.

    Raises:
        StoreError: the file is missing, corrupted, or truncated.
        StoreAccessError: the system could not read the file, or it is of another format version.
    """
    try:
        with open(path, "rb") as file:
            block = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise store_error_from(error, path) from error
    if not block.startswith(b"{"):
        return None
    try:
        values: dict[str, Any] = json.loads(block)
        version = values.pop("version")
        if version != FORMAT_VERSION:
            raise unsupported_version(path, version)
        if values.pop("format") != kind or set(values) != set(keys):
            raise ValueError("unexpected keys")
        if pack_header(kind, values) != block:
            raise ValueError("not in canonical form")
        expected_size = int(values["size"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{path}: corrupted header: {error}", hint) from error
    if size != expected_size:
        problem = "truncated" if size < expected_size else "longer than it was written"
        raise StoreError(f"{path}: {problem}: {size} bytes instead of {expected_size}", hint)
    return values


def format_of(path: Path) -> str | None:
    """Return the format named in the header of a file.

    Returns:
        The format, "" if the header is corrupted, or None if the file has no header or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            block, signature = file.read(HEADER_BYTES), file.read(len(_HDF5_SIGNATURE))
    except OSError:  # opening it as HDF5 raises the error with its reason
        return None
    if not block.startswith(b"{") or signature != _HDF5_SIGNATURE:
        return None
    try:
        return str(json.loads(block)["format"])
    except (ValueError, KeyError, RecursionError):
        return ""


def unsupported_version(path: Path, version: object) -> StoreAccessError:
    """Return the error for a file of another format version."""
    older = isinstance(version, int) and version < FORMAT_VERSION
    hint = "delete the store and extract it again" if older else "update gridcap"
    return StoreAccessError(f"{path}: format version {version}; this version of gridcap reads {FORMAT_VERSION}", hint)
