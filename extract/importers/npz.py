"""Arrays in .npz files, without loading large ones into memory."""

from __future__ import annotations

import shutil
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np

LARGE = 2**24  # bytes; smaller arrays are loaded
_CHUNK = 2**20
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of the name and of the extra field


def open_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name; arrays of 16 MiB or more are memory-mapped, read-only.

    An array that `numpy.savez` wrote is mapped in place. One that `numpy.savez_compressed` wrote is decompressed once
    into a temporary file, which is deleted together with the array.

    Raises:
        ValueError: an array contains Python objects.
        Exception: other types for a corrupted file.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        return {member.filename.removesuffix(".npy"): _open_member(archive, member, path) for member in members}


def _open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> np.ndarray:
    with archive.open(member) as content:  # checks the CRC on the way
        if member.file_size < LARGE:
            return np.asarray(np.lib.format.read_array(content, allow_pickle=False))
        if member.compress_type == zipfile.ZIP_STORED:
            while content.read(_CHUNK):
                pass
            return _map_array(path, _content_offset(path, member))
        with tempfile.NamedTemporaryFile(prefix="gridcap-", suffix=".npy") as copy:
            shutil.copyfileobj(content, copy, _CHUNK)
            copy.flush()
            return _map_array(Path(copy.name), 0)


def _content_offset(path: Path, member: zipfile.ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(member.header_offset)
        name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return int(member.header_offset + _LOCAL_HEADER.size + name_length + extra_length)


def _map_array(path: Path, offset: int) -> np.ndarray:
    """Map the .npy content that starts at `offset` in a file."""
    with path.open("rb") as file:
        file.seek(offset)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("contains Python objects; only arrays of numbers are supported")
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if by_columns else "C")
