"""Writer of shards (`shard_format` describes the format)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gridcap.common.errors import StoreError
from gridcap.common.files import fsync_path, put_in_place, sha256_of, temporary_sibling
from gridcap.common.store.checksum import crc32
from gridcap.common.store.codecs import ZSTD_FILTER, ZSTD_LEVEL, check_available, compress
from gridcap.common.store.hdf5 import text_array
from gridcap.common.store.header import FORMAT_VERSION, HEADER_BYTES
from gridcap.common.store.shard_format import (
    ALIGNMENT,
    ORIGINAL,
    RECREATE_SHARD,
    SHARD_FORMAT,
    ShardInfo,
    ShardSpec,
    dataset_name,
)
from gridcap.common.store.shard_reader import ShardReader

_CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # from file systems without posix_fallocate
_ROW_OVERHEAD = 512  # bytes per row in the other datasets, generously
_FILE_OVERHEAD = 1 << 20


class InvalidGridError(ValueError):
    """A grid contains a value that the stored type cannot represent. The message names the image."""


class ShardWriter:
    """Writes one shard atomically: under a temporary name, checked, then renamed.

    Use it as a context manager. Leaving the block before `finish` removes the temporary file.

    Args:
        path: final path of the shard.
        spec: its content apart from the grids.
    """

    def __init__(self, path: Path, spec: ShardSpec) -> None:
        self.path = path
        self._spec = spec
        self._rows = len(spec.images)
        self._codec = spec.layout.codec
        check_available(self._codec)
        self._packed: dict[tuple[int, str], bytes] = {}  # compressed rows that wait for earlier ones
        self._unpacked: list[tuple[int, str]] = []  # compressed rows that are not in the file yet, the next one last
        self._valid = np.zeros(self._rows, bool)
        self._written = {view: np.zeros(self._rows, bool) for view in spec.layout.views}
        self._crc = {view: np.zeros(self._rows, "<u4") for view in spec.layout.views}
        self._invalid_reasons: dict[int, str] = {}
        self._offsets: dict[str, int] = {}
        self._descriptor = -1
        self._temporary = temporary_sibling(path)
        names = text_array([name for _, name in spec.images])
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = h5py.File(
            self._temporary,
            "x",
            alignment_threshold=ALIGNMENT,
            alignment_interval=1 if self._codec.compressed else ALIGNMENT,  # alignment would pad every chunk
            locking=False,
            userblock_size=HEADER_BYTES,
        )
        try:
            self._create_datasets(names)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _create_datasets(self, names: np.ndarray) -> None:
        spec = self._spec
        with self._naming_the_shard():
            self._descriptor = os.open(self._temporary, os.O_RDWR)
        datasets = self._codec.datasets(spec.layout.grid_shape)
        grid_bytes = self._codec.row_bytes(spec.layout.grid_shape)
        row_bytes = len(spec.layout.views) * grid_bytes + names.dtype.itemsize + _ROW_OVERHEAD
        self._reserve(self._rows * row_bytes + _FILE_OVERHEAD)
        for view in spec.layout.views:
            for name, (shape, kind) in datasets.items():
                self._offsets[dataset_name(name, view)] = self._allocate(dataset_name(name, view), shape, kind)
        if self._codec.compressed:
            self._unpacked = [(row, name) for row in reversed(range(self._rows)) for name in reversed(self._offsets)]
        self._file["image_id"] = np.array([image_id for image_id, _ in spec.images], "<i8")
        self._file["file_name"] = names
        self._file.attrs.update({"format": SHARD_FORMAT, "version": FORMAT_VERSION})
        self._file.attrs.update({"index": spec.index, "plan": spec.plan, "split": spec.split})
        self._file.attrs["provenance"] = json.dumps(spec.provenance, sort_keys=True)

    def _allocate(self, name: str, row_shape: tuple[int, ...], kind: np.dtype[Any]) -> int:
        """Create a dataset and return the position of its first byte in the file.

        Rows are written there with `pwrite`: writing them through HDF5 would hold its global lock and Python's.
        """
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        if self._codec.compressed:
            properties.set_chunk((1, *row_shape))
            properties.set_filter(ZSTD_FILTER, h5py.h5z.FLAG_MANDATORY, (ZSTD_LEVEL,))
        else:
            properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        properties.set_obj_track_times(False)
        space, stored = h5py.h5s.create_simple((self._rows, *row_shape)), h5py.h5t.py_create(kind, logical=True)
        dataset = h5py.h5d.create(self._file.id, name.encode(), stored, space, properties)
        offset = None if self._codec.compressed else dataset.get_offset()
        return 0 if offset is None else int(offset)  # None for a dataset without bytes, and for chunks

    def _reserve(self, size: int) -> None:
        """Reserve disk space before the first write. `finish` releases what was not used.

        When a disk fills up while HDF5 writes, closing the file fails too, and the process crashes.
        """
        if not hasattr(os, "posix_fallocate"):
            return
        previous = os.fstat(self._descriptor).st_size
        try:
            with self._naming_the_shard():
                os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            os.ftruncate(self._descriptor, previous)
            if error.errno not in _CANNOT_RESERVE:
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
        """Make operating-system errors name the shard instead of its temporary file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def write(self, start: int, grids: np.ndarray, invalid_reasons: Mapping[int, str], view: str = ORIGINAL) -> None:
        """Write consecutive rows of one view, each of them once.

        Args:
            start: first row.
            grids: (b, *grid_shape) floats of any width. The rows of invalid images are set to NaN in place.
            invalid_reasons: row -> reason, for the invalid images among these rows; the same for all views.
            view: name of the view.

        Raises:
            InvalidGridError: the grid of a valid image contains a value that the codec cannot represent: NaN, infinity
                (for example after a float16 overflow), or, for uint8, a negative value.
        """
        rows = range(start, start + len(grids))
        for row, reason in invalid_reasons.items():
            grids[row - start] = np.nan
            self._invalid_reasons[row] = reason
        parts, representable = self._codec.encode(grids)
        for row in rows:
            if row not in invalid_reasons and not representable[row - start]:
                name = self._spec.images[row][1]
                raise InvalidGridError(f"{name}: its grid contains a value that {self._codec.stored} cannot represent")
            self._valid[row] = row not in invalid_reasons
        self._store(start, parts, view)

    def copy(self, row: int, reader: ShardReader, reason: str | None = None) -> None:
        """Copy the stored bytes of a row, in all views, from another shard.

        Args:
            row: the same in both shards.
            reader: of the other shard.
            reason: replaces the reason of an invalid image.

        Raises:
            StoreError: the row is corrupted in the other shard.
        """
        self._valid[row] = reader.valid[row]
        if not self._valid[row]:
            self._invalid_reasons[row] = reason or reader.invalid_reasons[row]
        for view in self._written:
            self._store(row, [part[None] for part in reader.stored_parts(row, view)], view)
            if self._crc[view][row] != reader.checksums[view][row]:
                raise StoreError(f"{reader.path}: row {row} is corrupted", RECREATE_SHARD)

    def _store(self, start: int, parts: Sequence[np.ndarray], view: str) -> None:
        """Write the parts of some rows and update the checksums of the rows."""
        rows = range(start, start + len(parts[0]))
        datasets = self._codec.datasets(self._spec.layout.grid_shape)
        for (name, (_, kind)), part in zip(datasets.items(), parts, strict=True):
            stored = np.ascontiguousarray(part, kind)
            if self._codec.compressed:
                self._packed.update({(row, dataset_name(name, view)): compress(stored[row - start]) for row in rows})
            else:
                self._write_at(self._offsets[dataset_name(name, view)] + start * stored[0].nbytes, stored)
            for row in rows:
                previous = 0 if name == "features" else int(self._crc[view][row])
                self._crc[view][row] = crc32(stored[row - start].data, previous)
        self._written[view][rows.start : rows.stop] = True
        self._write_packed()

    def _write_packed(self) -> None:
        """Write compressed rows as soon as all earlier ones are written, so that the file does not depend on the order.

        The disk cannot be full: the space of uncompressed rows was reserved.
        """
        while self._unpacked and self._unpacked[-1] in self._packed:
            row, name = key = self._unpacked.pop()
            dataset = self._file[name]
            dataset.id.write_direct_chunk((row, *(0 for _ in dataset.shape[1:])), self._packed.pop(key))

    def _write_at(self, offset: int, values: np.ndarray) -> None:
        remaining = values.reshape(-1).view(np.uint8).data
        while remaining:
            with self._naming_the_shard():  # the disk may be full if no space could be reserved
                count = os.pwrite(self._descriptor, remaining, offset)
            offset, remaining = offset + count, remaining[count:]

    def finish(self, batch_size: int | None = None) -> ShardInfo:
        """Complete the file, flush it, verify it from disk, add its header, and rename it.

        Args:
            batch_size: number of images that the encoder computed at a time, to be recorded.

        Raises:
            ValueError: a row was never written.
            StoreError: the bytes read back differ from those written.
        """
        for view, written in self._written.items():
            if not written.all():
                raise ValueError(f"{self.path}: {int((~written).sum())} rows of {view} were never written")
        self._write_columns()
        if batch_size is not None:
            self._file.attrs["batch_size"] = batch_size
        self._close_descriptor()
        self._file.flush()
        size = self._file.id.get_filesize()
        self._file.close()
        os.truncate(self._temporary, size)  # releases the rest of the reserved space
        fsync_path(self._temporary)
        with ShardReader(self._temporary) as reader:
            if corrupted := reader.corrupted_rows():
                raise StoreError(
                    f"{self.path}: rows {corrupted[:5]} read back from disk differ from what was written",
                    "check the disk, then run the command again",
                )
        info = ShardInfo(
            index=self._spec.index,
            plan=self._spec.plan,
            rows=self._rows,
            invalid=len(self._invalid_reasons),
            size=size,
            sha256=sha256_of(self._temporary, HEADER_BYTES),
        )
        with open(self._temporary, "r+b") as file:
            file.write(info.to_bytes())
        put_in_place(self._temporary, self.path)
        return info

    def _write_columns(self) -> None:
        rows = sorted(self._invalid_reasons)
        self._file["valid"] = self._valid
        for view, crc in self._crc.items():
            self._file[dataset_name("crc32", view)] = crc
        self._file["invalid_row"] = np.asarray(rows, "<i8")
        self._file["invalid_reason"] = text_array([self._invalid_reasons[row] for row in rows])
