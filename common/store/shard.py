"""The shard: one plain HDF5 file with the grids of some images. Writer and reader, side by side.

Layout (all at the root, little-endian):

    features     (n, *grid)  float16, float32 or uint8, contiguous, aligned to 4096 bytes; (row, column, channel)
    scale        (n, C)      float16, for uint8 alone: grid = features * scale, a scale for each channel of each image
    image_id     (n,)        int64
    file_name    (n,)        UTF-8, fixed length
    valid        (n,)        bool; a refused image keeps its row, filled with NaN (uint8: zeros with a NaN scale)
    crc32        (n,)        uint32, CRC-32 (zlib) of each row's bytes (uint8: of the row's, then its scale's)
    reject_row   (m,)        int64, the refused rows
    reject_why   (m,)        UTF-8, fixed length, the reason for each
    attributes   format = "gridcap-shard", version, index, plan (SHA-256 of the plan), provenance (JSON)

A store with more views of an image has `features_hflip`, `crc32_hflip`, ... beside them.

HDF5 leaves the first 4096 bytes to us (its "user block"). There stands the shard's header: a line of JSON with
the SHA-256 of all that follows, so that a shard vouches for itself, and whoever looks over many shards need not
open them as HDF5. The file depends on nothing but the arguments: no times, no host names, no order of writing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gridcap.common.errors import StoreError
from gridcap.common.files import fsync_path, sha256_of, temporary_sibling
from gridcap.common.store.hdf5 import check_own_data, corruption_as_store_error, open_hdf5
from gridcap.common.store.pinned_file import (
    HEADER_BYTES,
    VERSION,
    PinnedFile,
    opening,
    other_version,
    pack_header,
    unpack_header,
)
from gridcap.common.store.quantize import LARGEST, dequantize, quantize

SHARD_FORMAT = "gridcap-shard"
ALIGNMENT = 4096
ORIGINAL = "original"  # the view that every store has
_NO_RESERVATION = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # file systems that cannot set space aside


class InvalidGridError(ValueError):
    """A grid holds a value that the stored type cannot hold; the message names the image."""


@dataclass(frozen=True)
class ShardInfo:
    """A shard's header.

    Attributes:
        index: which shard of its store.
        plan: SHA-256 of the plan it was made by.
        rows, rejected: how many images, and how many of them were refused.
        size: of the whole file in bytes.
        sha256: of everything after the header.
    """

    index: int
    plan: str
    rows: int
    rejected: int
    size: int
    sha256: str

    def to_bytes(self) -> bytes:
        """The header as it stands in the file, HEADER_BYTES long."""
        return pack_header(SHARD_FORMAT, self.__dict__)


def read_header(path: Path) -> ShardInfo | None:
    """The header of a shard; None and errors as for `unpack_header`."""
    values = unpack_header(path, SHARD_FORMAT, ShardInfo.__dataclass_fields__, _REMAKE)
    return None if values is None else ShardInfo(**values)


def text_array(texts: Sequence[str], length: int = 1) -> np.ndarray:
    """Texts as a fixed-length UTF-8 array that h5py stores as an HDF5 string of that length (or longer, to fit)."""
    encoded = [text.encode() for text in texts]
    length = max([length, *map(len, encoded)])
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", length))


def decode_texts(dataset: h5py.Dataset) -> list[str]:
    """The texts of a string dataset."""
    return [value.decode() if isinstance(value, bytes) else str(value) for value in dataset[:]]


def dataset_of(name: str, view: str) -> str:
    """The name of a view's dataset: "features" of the original, "features_hflip" of the mirrored view."""
    return name if view == ORIGINAL else f"{name}_{view}"


def read_dtype(stored: np.dtype[Any]) -> np.dtype[Any]:
    """The type of the grids that readers return: uint8 is stored with scales and comes back as float16."""
    return np.dtype("<f2") if stored == np.uint8 else stored


class ShardWriter:
    """Writes one shard under a temporary name, checks it, and gives it its name: whole or not at all.

    Use as a context manager; leaving it by an exception removes the temporary file.

    Args:
        path: the final name.
        image_ids, file_names: of the rows, in order.
        grid_shape: of one row, (row, column, channel).
        dtype: "float16", "float32" or "uint8".
        attributes: `index`, `plan`, `split` and `provenance` of this shard.
        views: of each image; the original comes first.
    """

    def __init__(
        self,
        path: Path,
        image_ids: Sequence[int],
        file_names: Sequence[str],
        grid_shape: Sequence[int],
        dtype: str,
        attributes: Mapping[str, Any],
        views: Sequence[str] = (ORIGINAL,),
    ) -> None:
        self.path = path
        self._rows = len(image_ids)
        self._names = list(file_names)
        self._identity = {"index": attributes["index"], "plan": attributes["plan"]}
        self._valid = np.zeros(self._rows, bool)
        self._written = {view: np.zeros(self._rows, bool) for view in views}
        self._crc = {view: np.zeros(self._rows, "<u4") for view in views}
        self._rejects: dict[int, str] = {}
        self._temporary = temporary_sibling(path)
        self._stored = stored = np.dtype(dtype).newbyteorder("<")
        names = text_array(file_names)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = h5py.File(
            self._temporary,
            "x",
            alignment_threshold=ALIGNMENT,
            alignment_interval=ALIGNMENT,
            locking=False,
            userblock_size=HEADER_BYTES,
        )
        self._offsets: dict[str, int] = {}
        self._descriptor = -1
        try:
            with self._naming_the_shard():
                self._descriptor = os.open(self._temporary, os.O_RDWR)
            row_bytes = len(views) * stored_bytes(grid_shape, dtype)
            self._reserve(self._rows * (row_bytes + names.dtype.itemsize + 512) + (1 << 20))
            for view in views:
                shapes: dict[str, tuple[tuple[int, ...], Any]] = {"features": ((self._rows, *grid_shape), stored)}
                if stored == np.uint8:
                    shapes["scale"] = ((self._rows, grid_shape[-1]), "<f2")
                for name, (shape, kind) in shapes.items():
                    self._offsets[dataset_of(name, view)] = self._place(dataset_of(name, view), shape, kind)
            self._file["image_id"] = np.asarray(image_ids, "<i8")
            self._file["file_name"] = names
            self._file.attrs.update({"format": SHARD_FORMAT, "version": VERSION})
            for key, value in attributes.items():
                self._file.attrs[key] = json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else value
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _place(self, name: str, shape: tuple[int, ...], kind: Any) -> int:
        """Make a dataset of rows, and tell where in the file its first byte is.

        The rows are written there past HDF5, whose one lock, and Python's, would be held for as long as that takes.
        """
        early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        early.set_obj_track_times(False)
        space, stored = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(kind), logical=True)
        offset = h5py.h5d.create(self._file.id, name.encode(), stored, space, early).get_offset()
        return 0 if offset is None else int(offset)  # None: it has no bytes

    def _reserve(self, size: int) -> None:
        """Set disk space aside before anything is written; `finish` gives back what was not used.

        HDF5 does not survive a disk that fills up while it writes: closing the file fails too, and crashes.
        """
        if not hasattr(os, "posix_fallocate"):
            return
        before = os.fstat(self._descriptor).st_size
        try:
            with self._naming_the_shard():
                os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            os.ftruncate(self._descriptor, before)
            if error.errno not in _NO_RESERVATION:
                raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            try:
                self._close_descriptor()
            finally:
                if self._file:
                    self._file.close()
        except (OSError, RuntimeError):
            if kind is None:
                raise
        finally:
            self._temporary.unlink(missing_ok=True)

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with self._naming_the_shard():
                os.close(descriptor)

    @contextlib.contextmanager
    def _naming_the_shard(self) -> Iterator[None]:
        """An operating-system error in the block names the shard: its temporary name tells the user nothing."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def write(self, start: int, grids: np.ndarray, rejects: Mapping[int, str], view: str = ORIGINAL) -> None:
        """Write rows `start` to `start + len(grids)` of one view.

        Args:
            start: the first row.
            grids: (b, *grid) in the stored type, or float16 or float32 if that is uint8; changed in place: refused
                rows become NaN.
            rejects: row -> reason, for rows of this call whose image was refused.
            view: which of the views; the rejects of all views of an image are the same.

        Raises:
            InvalidGridError: a row that is not refused holds NaN or infinity (a float16 overflow, say), or a
                negative value for uint8.
        """
        rows = range(start, start + len(grids))
        for row, reason in rejects.items():
            grids[row - start] = np.nan
            self._rejects[row] = reason
        flat = grids.reshape(len(grids), -1)
        sound = _finite_rows(flat)
        if self._stored == np.uint8:
            sound &= ((flat >= 0) & (flat <= LARGEST)).all(1)
        for row in rows:
            if row not in rejects and not sound[row - start]:
                raise InvalidGridError(f"{self._names[row]}: its grid holds a value that {self._stored} cannot hold")
            self._valid[row] = row not in rejects
        parts = list(quantize(grids)) if self._stored == np.uint8 else [grids]
        self._store(start, parts, view)

    def copy(self, row: int, reader: ShardReader, reason: str | None = None) -> None:
        """Copy a row with all its views from another shard, byte by byte; `reason` replaces a refused image's.

        Raises:
            StoreError: the row is damaged there.
        """
        self._valid[row] = reader.valid[row]
        if not self._valid[row]:
            self._rejects[row] = reason or reader.rejects[row]
        for view in self._written:
            self._store(row, [part[None] for part in reader.stored_parts(row, view)], view)
            if self._crc[view][row] != reader.checksums[view][row]:
                raise StoreError(f"{reader.path}: row {row} is damaged", _REMAKE)

    def _store(self, start: int, parts: Sequence[np.ndarray], view: str) -> None:
        rows = range(start, start + len(parts[0]))
        for name, kind, part in zip(("features", "scale"), (self._stored, np.dtype("<f2")), parts, strict=False):
            stored = np.ascontiguousarray(part, kind)
            self._write_at(self._offsets[dataset_of(name, view)] + start * stored[0].nbytes, stored)
            for row in rows:
                before = 0 if name == "features" else int(self._crc[view][row])
                self._crc[view][row] = zlib.crc32(stored[row - start].data, before)
        self._written[view][rows.start : rows.stop] = True

    def _write_at(self, offset: int, values: np.ndarray) -> None:
        left = values.reshape(-1).view(np.uint8).data
        while left:
            with self._naming_the_shard():  # a full disk, if it could not set space aside
                count = os.pwrite(self._descriptor, left, offset)
            offset, left = offset + count, left[count:]

    def finish(self) -> ShardInfo:
        """Complete the file, bring it to the disk, read it back, compare, and give it its final name.

        Raises:
            StoreError: the disk gave back something else than was written.
        """
        for view, written in self._written.items():
            if not written.all():
                raise ValueError(f"{self.path}: {int((~written).sum())} rows of {view} were never written")
        rows = sorted(self._rejects)
        self._file["valid"] = self._valid
        for view, crc in self._crc.items():
            self._file[dataset_of("crc32", view)] = crc
        self._file["reject_row"] = np.asarray(rows, "<i8")
        self._file["reject_why"] = text_array([self._rejects[row] for row in rows])
        self._close_descriptor()
        self._file.flush()
        size = self._file.id.get_filesize()
        self._file.close()
        os.truncate(self._temporary, size)  # the rest of what was set aside
        fsync_path(self._temporary)
        with ShardReader(self._temporary) as reader:
            if bad := reader.corrupted_rows():
                raise StoreError(
                    f"{self.path}: rows {bad[:5]} read back from the disk differ from what was written",
                    "check the disk, then run the same command again",
                )
        info = ShardInfo(
            rows=self._rows,
            rejected=len(rows),
            size=size,
            sha256=sha256_of(self._temporary, HEADER_BYTES),
            **self._identity,
        )
        with open(self._temporary, "r+b") as file:
            file.write(info.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._temporary, self.path)
        fsync_path(self.path.parent)
        return info


def _finite_rows(flat: np.ndarray) -> np.ndarray:
    """(b, n) floats -> (b,) bool: whether all of a row is finite.

    numpy asks float16 numbers one by one. As whole numbers the positive ones that are not finite begin at 0x7c00,
    and the negative ones, without sign, at 0xfc00: so two maxima tell, twenty times as quickly.
    """
    if flat.dtype == np.float16 and flat.dtype.isnative and flat.flags.c_contiguous:
        return (flat.view(np.int16).max(1) < 0x7C00) & (flat.view(np.uint16).max(1) < 0xFC00)  # type: ignore[no-any-return]
    return np.isfinite(flat).all(1)  # type: ignore[no-any-return]


def stored_bytes(grid_shape: Sequence[int], dtype: str) -> int:
    """The bytes of one grid in the store: float16, float32, or uint8 with its scales."""
    values = int(np.prod(grid_shape, dtype=np.int64))
    return values * np.dtype(dtype).itemsize + (2 * grid_shape[-1] if dtype == "uint8" else 0)


class ShardReader:
    """Reads rows of one shard with `pread`, past HDF5's lock, from as many threads as you like.

    The file is opened with h5py once, to check it and to find where the rows lie; its columns are read when they
    are asked for. A file whose `features` are chunked or compressed (rewritten by other tools) is read through
    h5py: slower and just as right. The open file is dropped on pickling and opened again on the next read.

    Attributes:
        shape: (n, *grid_shape).
        stored: the type in the file.
        dtype: the type of the grids that `read_row` gives.
        views: of each image.
        index, plan: which shard of its store, and the SHA-256 of the plan it was made by.

    Raises:
        StoreError: missing, not HDF5, not a shard, of another version, or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_hdf5(path) as file:
            self._file = PinnedFile(path)
            with corruption_as_store_error(path, "shard", _REMAKE):
                check_format(file, path, SHARD_FORMAT)
                features = file["features"]
                self.shape: tuple[int, ...] = features.shape
                self.stored: np.dtype[Any] = features.dtype
                self.views = tuple(view for name in sorted(file) if (view := _view_of(name)) is not None)
                self._offsets: dict[str, int | None] = {}
                end = 0
                for view in self.views:
                    names = ["features"] + (["scale"] if self.stored == np.uint8 else [])
                    for name in (dataset_of(n, view) for n in names):
                        dataset = file[name]
                        offset = dataset.id.get_offset() if dataset.chunks is None else None
                        self._offsets[name] = offset
                        end = max(end, 0 if offset is None else offset + dataset.nbytes)
                columns = ["image_id", "file_name", "valid", *(dataset_of("crc32", v) for v in self.views)]
                lengths = {len(file[name]) for name in [*columns, *self._offsets]}
                self.index, self.plan = file.attrs["index"], file.attrs["plan"]
                if len(file["reject_row"]) != len(file["reject_why"]):
                    raise ValueError("its reject table has columns of different lengths")
                json.loads(file.attrs["provenance"])
        rows = self.shape[0]
        if lengths != {rows}:
            raise StoreError(f"{path}: its arrays have different lengths", _REMAKE)
        self.dtype = read_dtype(self.stored)
        self._in_levels = bool(self.stored == np.uint8)
        if path.stat().st_size < end:
            raise StoreError(f"{path}: truncated: {path.stat().st_size} bytes", _REMAKE)
        self._foreign: h5py.File | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @functools.cached_property
    def image_ids(self) -> np.ndarray:
        """(n,) int64."""
        with self._sound() as file:
            return file["image_id"][:]  # type: ignore[no-any-return]

    @functools.cached_property
    def file_names(self) -> list[str]:
        """n paths below the image folder."""
        with self._sound() as file:
            return decode_texts(file["file_name"])

    @functools.cached_property
    def valid(self) -> np.ndarray:
        """(n,) bool; false for a refused image."""
        with self._sound() as file:
            return file["valid"][:].astype(bool)  # type: ignore[no-any-return]

    @functools.cached_property
    def rejects(self) -> dict[int, str]:
        """Row -> reason, for the refused images."""
        with self._sound() as file:
            return dict(zip(file["reject_row"][:].tolist(), decode_texts(file["reject_why"]), strict=True))

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """Where the numbers come from."""
        with self._sound() as file:
            return json.loads(file.attrs["provenance"])  # type: ignore[no-any-return]

    @functools.cached_property
    def checksums(self) -> dict[str, np.ndarray]:
        """View -> (n,) uint32, the CRC-32 of each row."""
        with self._sound() as file:
            return {view: file[dataset_of("crc32", view)][:] for view in self.views}

    @contextlib.contextmanager
    def _sound(self) -> Iterator[h5py.File]:
        """The file, opened for a moment; what damage leads the libraries to raise becomes a StoreError."""
        with open_hdf5(self.path) as file, corruption_as_store_error(self.path, "shard", _REMAKE):
            yield file

    def read_row(self, row: int, out: np.ndarray, view: str = ORIGINAL, check: bool = False) -> None:
        """Read one row into `out`, a contiguous (*grid) array of `dtype`.

        Args:
            check: compare its bytes with their checksum.

        Raises:
            StoreError: the file ends before the row does, or the row is not what was written.
        """
        if self._in_levels:
            parts = self.stored_parts(row, view)
        else:
            self._read(dataset_of("features", view), row, out)
            parts = [out]
        if check and _crc32(parts) != self.checksums[view][row]:
            raise StoreError(f"{self.path}: row {row} is damaged: its bytes are not those that were written", _VERIFY)
        if self._in_levels:
            dequantize(parts[0], parts[1], out)

    def row_crc32(self, row: int, view: str = ORIGINAL) -> int:
        """The CRC-32 of a row's bytes as they are on the disk.

        Raises:
            StoreError: the file ends before the row does.
        """
        return _crc32(self.stored_parts(row, view))

    def stored_parts(self, row: int, view: str = ORIGINAL) -> list[np.ndarray]:
        """A row as it is in the file: the grid; or for uint8 the levels, and the scales of its channels."""
        parts = [np.empty(self.shape[1:], self.stored)]
        self._read(dataset_of("features", view), row, parts[0])
        if self._in_levels:
            parts.append(np.empty(self.shape[-1], "<f2"))
            self._read(dataset_of("scale", view), row, parts[1])
        return parts

    def _read(self, name: str, row: int, out: np.ndarray) -> None:
        offset = self._offsets[name]
        if offset is None:
            with opening():
                if self._foreign is None:
                    self._foreign = h5py.File(self.path, "r", locking=False)
            try:
                self._foreign[name].read_direct(out, np.s_[row])
            except OSError as error:
                raise StoreError(f"{self.path}: row {row} cannot be read: {error}", _REMAKE) from error
        elif not self._file.read_into(out.data.cast("B"), offset + row * out.nbytes):
            raise StoreError(f"{self.path}: ends inside row {row}", _REMAKE)

    def corrupted_rows(self) -> list[int]:
        """The rows whose bytes, in any view, do not match their CRC-32."""
        return [row for row in range(len(self)) if any(self._differs(row, v, c) for v, c in self.checksums.items())]

    def _differs(self, row: int, view: str, checksums: np.ndarray) -> bool:
        try:
            return self.row_crc32(row, view) != int(checksums[row])
        except StoreError:
            return True

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        self._file.close()
        if self._foreign is not None:
            self._foreign.close()
            self._foreign = None

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_foreign": None}


_VERIFY = "verify-features --repair removes what is damaged, and extract-features makes just that again"
_REMAKE = "delete this file and run extract-features again: it makes just the missing shards"


def _crc32(parts: Iterable[np.ndarray]) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part.data, crc)
    return crc


def check_format(file: h5py.File, path: Path, *formats: str) -> str:
    """The file's format, if it is one of `formats` in a version we read.

    Raises:
        StoreError: another format, or a newer version; or numbers that lie in other files.
    """
    with corruption_as_store_error(path):
        found, version = file.attrs.get("format"), file.attrs.get("version")
    if not isinstance(found, str) or found not in formats:
        raise StoreError(
            f"{path}: an HDF5 file, but no gridcap features (format {found!r})", "give a file made by extract-features"
        )
    if not isinstance(version, (int, np.integer)) or version != VERSION:
        raise other_version(path, version)
    # The index shows all shards as one array to plain h5py; our own reader goes to the shards.
    check_own_data(file, path, () if found == SHARD_FORMAT else ("features", "scale"))
    return str(found)


def _view_of(name: str) -> str | None:
    """The view whose features a dataset holds: "features" -> "original", "features_hflip" -> "hflip"."""
    if name == "features":
        return ORIGINAL
    return name.removeprefix("features_") if name.startswith("features_") else None
