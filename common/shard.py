"""The shard: one plain HDF5 file with the grids of some images. Writer and reader, side by side.

Layout (all at the root, little-endian):

    features     (n, *grid)  float16 or float32, contiguous, aligned to 4096 bytes; (row, column, channel)
    image_id     (n,)        int64
    file_name    (n,)        UTF-8, fixed length
    valid        (n,)        bool; a refused image keeps its row, filled with NaN, and `valid` false
    crc32        (n,)        uint32, CRC-32 (zlib) of each row's bytes
    reject_row   (m,)        int64, the refused rows
    reject_why   (m,)        UTF-8, fixed length, the reason for each
    attributes   format = "gridcap-shard", version = 1, index, plan (SHA-256 of the plan), provenance (JSON)

The file depends on nothing but the arguments: no times, no host names, no order of writing.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from common.errors import StoreError
from common.files import fsync_path, sha256_of, temporary_sibling

SHARD_FORMAT = "gridcap-shard"
VERSION = 1
ALIGNMENT = 4096
_NO_RESERVATION = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # file systems that cannot set space aside
_opening = threading.Lock()
# What h5py, numpy and json raise over damaged bytes, depending on which are damaged.
_DAMAGE = (KeyError, ValueError, OSError, RuntimeError, TypeError, AttributeError, MemoryError, OverflowError)


class UnstorableError(ValueError):
    """A grid holds a value that the stored type cannot hold; the message names the image."""


@dataclass(frozen=True)
class ShardInfo:
    """A finished shard: its file name, its number of rows, and the SHA-256 of the whole file."""

    name: str
    rows: int
    sha256: str


def text_array(texts: Sequence[str]) -> np.ndarray:
    """Texts as a fixed-length UTF-8 array that h5py stores as an HDF5 string of that length."""
    encoded = [text.encode() for text in texts]
    length = max([1, *map(len, encoded)])
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", length))


def decode_texts(dataset: h5py.Dataset) -> list[str]:
    """The texts of a string dataset."""
    return [value.decode() if isinstance(value, bytes) else str(value) for value in dataset[:]]


class ShardWriter:
    """Writes one shard under a temporary name, checks it, and gives it its name: whole or not at all.

    Use as a context manager; leaving it by an exception removes the temporary file.

    Args:
        path: the final name.
        image_ids, file_names: of the rows, in order.
        grid_shape: of one row, (row, column, channel).
        dtype: "float16" or "float32".
        attributes: `index`, `plan` and `provenance` of this shard.
    """

    def __init__(
        self,
        path: Path,
        image_ids: Sequence[int],
        file_names: Sequence[str],
        grid_shape: Sequence[int],
        dtype: str,
        attributes: Mapping[str, Any],
    ) -> None:
        self.path = path
        self._rows = len(image_ids)
        self._names = list(file_names)
        self._valid = np.zeros(self._rows, bool)
        self._written = np.zeros(self._rows, bool)
        self._crc = np.zeros(self._rows, "<u4")
        self._rejects: dict[int, str] = {}
        self._temporary = temporary_sibling(path)
        stored = np.dtype(dtype).newbyteorder("<")
        names = text_array(file_names)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = h5py.File(
            self._temporary, "x", alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT, locking=False
        )
        try:
            row_bytes = int(np.prod(grid_shape, dtype=np.int64)) * stored.itemsize
            self._reserve(self._rows * (row_bytes + names.dtype.itemsize + 512) + (1 << 20))
            self._features = self._file.create_dataset("features", (self._rows, *grid_shape), stored, fill_time="never")
            self._file["image_id"] = np.asarray(image_ids, "<i8")
            self._file["file_name"] = names
            self._file.attrs.update({"format": SHARD_FORMAT, "version": VERSION})
            for key, value in attributes.items():
                self._file.attrs[key] = json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else value
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _reserve(self, size: int) -> None:
        """Set disk space aside before anything is written; `finish` gives back what was not used.

        HDF5 does not survive a disk that fills up while it writes: closing the file fails too, and crashes.
        """
        if not hasattr(os, "posix_fallocate"):
            return
        descriptor = os.open(self._temporary, os.O_RDWR)
        try:
            before = os.fstat(descriptor).st_size
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            os.ftruncate(descriptor, before)
            if error.errno not in _NO_RESERVATION:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            os.close(descriptor)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if self._file:
                self._file.close()
        except (OSError, RuntimeError):
            if kind is None:
                raise
        finally:
            self._temporary.unlink(missing_ok=True)

    def write(self, start: int, grids: np.ndarray, rejects: Mapping[int, str]) -> None:
        """Write rows `start` to `start + len(grids)`.

        Args:
            start: the first row.
            grids: (b, *grid) in the stored type; changed in place: refused rows become NaN.
            rejects: row -> reason, for rows of this call whose image was refused.

        Raises:
            UnstorableError: a row that is not refused holds NaN or infinity (a float16 overflow, say).
        """
        rows = range(start, start + len(grids))
        for row, reason in rejects.items():
            grids[row - start] = np.nan
            self._rejects[row] = reason
        finite = np.isfinite(grids.reshape(len(grids), -1)).all(1)
        for row in rows:
            if row not in rejects and not finite[row - start]:
                raise UnstorableError(f"{self._names[row]}: its grid holds a value that {grids.dtype} cannot hold")
            self._crc[row] = zlib.crc32(np.ascontiguousarray(grids[row - start]).data)
            self._valid[row] = row not in rejects
        self._features[start : start + len(grids)] = grids
        self._written[start : start + len(grids)] = True

    def finish(self) -> ShardInfo:
        """Complete the file, bring it to the disk, read it back, compare, and give it its final name.

        Raises:
            StoreError: the disk gave back something else than was written.
        """
        if not self._written.all():
            raise ValueError(f"{self.path}: {int((~self._written).sum())} rows were never written")
        rows = sorted(self._rejects)
        self._file["valid"] = self._valid
        self._file["crc32"] = self._crc
        self._file["reject_row"] = np.asarray(rows, "<i8")
        self._file["reject_why"] = text_array([self._rejects[row] for row in rows])
        self._file.flush()
        size = self._file.id.get_filesize()
        self._file.close()
        os.truncate(self._temporary, size)  # the rest of what was set aside
        fsync_path(self._temporary)
        with ShardReader(self._temporary) as reader:
            if bad := reader.damaged_rows():
                raise StoreError(
                    f"{self.path}: rows {bad[:5]} read back from the disk differ from what was written",
                    "check the disk, then run the same command again",
                )
        info = ShardInfo(self.path.name, self._rows, sha256_of(self._temporary))
        os.replace(self._temporary, self.path)
        fsync_path(self.path.parent)
        return info


class ShardReader:
    """Reads rows of one shard with `pread`, past HDF5's lock, from as many threads as you like.

    The file is opened with h5py once, to check it and to find where the rows lie. A file whose `features` are
    chunked or compressed (rewritten by other tools) is read through h5py: slower and just as right. The open
    file is dropped on pickling and opened again on the next read.

    Raises:
        StoreError: missing, not HDF5, not a shard, of a newer version, or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_hdf5(path) as file:
            try:
                check_format(file, path, SHARD_FORMAT)
                features = file["features"]
                self.shape: tuple[int, ...] = features.shape
                self.dtype: np.dtype[Any] = features.dtype
                self.image_ids: np.ndarray = file["image_id"][:]
                self.file_names = decode_texts(file["file_name"])
                self.valid: np.ndarray = file["valid"][:].astype(bool)
                self.crc32: np.ndarray = file["crc32"][:]
                why = decode_texts(file["reject_why"])
                self.rejects = dict(zip(file["reject_row"][:].tolist(), why, strict=True))
                self.attributes = dict(file.attrs)
                self._offset: int | None = features.id.get_offset() if features.chunks is None else None
                self.provenance: dict[str, Any] = json.loads(self.attributes["provenance"])
            except _DAMAGE as error:
                raise StoreError(f"{path}: not a sound shard: {error}", _REMAKE) from error
        rows = self.shape[0]
        if any(len(a) != rows for a in (self.image_ids, self.file_names, self.valid, self.crc32)):
            raise StoreError(f"{path}: its arrays have different lengths", _REMAKE)
        self._row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        if self._offset is not None and path.stat().st_size < self._offset + rows * self._row_bytes:
            raise StoreError(f"{path}: truncated: {path.stat().st_size} bytes", _REMAKE)
        self._descriptor: int | None = None
        self._foreign: h5py.File | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def read_row(self, row: int, out: np.ndarray) -> None:
        """Read one row into `out`, a contiguous (*grid) array of the stored type.

        Raises:
            StoreError: the file ends before the row does.
        """
        if self._offset is None:
            with _opening:
                if self._foreign is None:
                    self._foreign = h5py.File(self.path, "r", locking=False)
            try:
                self._foreign["features"].read_direct(out, np.s_[row])
            except OSError as error:
                raise StoreError(f"{self.path}: row {row} cannot be read: {error}", _REMAKE) from error
            return
        with _opening:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
        view = out.data.cast("B")
        done, position = 0, self._offset + row * self._row_bytes
        while done < self._row_bytes:
            count = os.preadv(self._descriptor, [view[done:]], position + done)
            if count == 0:
                raise StoreError(f"{self.path}: ends inside row {row}", _REMAKE)
            done += count

    def damaged_rows(self) -> list[int]:
        """The rows whose bytes do not match their CRC-32."""
        out = np.empty(self.shape[1:], self.dtype)
        bad = []
        for row in range(len(self)):
            try:
                self.read_row(row, out)
            except StoreError:
                bad.append(row)
                continue
            if zlib.crc32(out.data) != self.crc32[row]:
                bad.append(row)
        return bad

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._foreign is not None:
            self._foreign.close()
            self._foreign = None

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None, "_foreign": None}


_REMAKE = "delete this file and run extract-features again: it makes just the missing shards"


def open_hdf5(path: Path) -> h5py.File:
    """Open a file for reading.

    Raises:
        StoreError: missing, unreadable or not HDF5.
    """
    try:
        return h5py.File(path, "r", locking=False)
    except FileNotFoundError as error:
        raise StoreError(f"{path}: no such file", "check the path, or make it with extract-features") from error
    except IsADirectoryError as error:
        raise StoreError(f"{path}: is a folder", f"give the index file beside it, {path}.h5") from error
    except PermissionError as error:
        raise StoreError(f"{path}: no permission to read it", "check the permissions") from error
    except OSError as error:
        raise StoreError(
            f"{path}: not a readable HDF5 file",
            "give a file made by extract-features; if it was, it is damaged: delete it and run that command again",
        ) from error


def check_format(file: h5py.File, path: Path, *formats: str) -> str:
    """The file's format, if it is one of `formats` in a version we read.

    Raises:
        StoreError: another format, or a newer version.
    """
    found = file.attrs.get("format")
    if not isinstance(found, str) or found not in formats:
        raise StoreError(
            f"{path}: an HDF5 file, but no gridcap features (format {found!r})", "give a file made by extract-features"
        )
    version = file.attrs.get("version")
    if not isinstance(version, (int, np.integer)) or version > VERSION:
        raise StoreError(f"{path}: format version {version}, and this gridcap reads up to {VERSION}", "update gridcap")
    return str(found)
