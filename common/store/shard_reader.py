"""Reader of shards (`shard_format` describes the format)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gridcap.common.errors import StoreAccessError, StoreError
from gridcap.common.store.checksum import crc32
from gridcap.common.store.chunks import locate_compressed_rows, require_filters
from gridcap.common.store.codecs import codec_of, decompress
from gridcap.common.store.hdf5 import (
    check_format,
    corruption_as_store_error,
    get_dataset,
    open_hdf5,
    read_attribute,
    read_column,
    read_json_attribute,
    read_texts,
)
from gridcap.common.store.pinned_file import PinnedFile, open_lock
from gridcap.common.store.shard_format import (
    ORIGINAL,
    RECREATE_SHARD,
    SHARD_FORMAT,
    dataset_name,
    view_of_dataset,
)

_REPAIR = "gridcap verify --repair removes corrupted shards, and extract-features writes only those again"


class ShardReader:
    """Reads the rows of one shard with `preadv`, outside HDF5's global lock, from any number of threads.

    The file is opened with h5py once to check it and to locate the rows. Its columns are read on first use. A file
    whose `features` are chunked or compressed (rewritten by another program) is read through h5py, which is slower.
    The reader can be pickled; a copy opens the file on its first read.

    Args:
        path: the shard.

    Attributes:
        shape: (n, *grid_shape).
        codec: how grids are stored.
        dtype: type of the grids that `read_row` returns.
        views: views of each image.
        index: position of the shard in its store.
        plan: SHA-256 of the plan that the shard belongs to.

    Raises:
        StoreError: the file is missing, corrupted, or truncated, or not a shard of this format version.
        StoreAccessError: the system could not read the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[str, int | None] = {}  # of each dataset with grids; None if it is read through h5py
        self._chunks: dict[str, list[tuple[int, int]]] = {}  # offset and size of each compressed row
        self._rewritten: h5py.File | None = None
        with open_hdf5(path) as file:
            self._file = PinnedFile(path)
            check_format(file, path, (SHARD_FORMAT,))
            with corruption_as_store_error(path, "shard", RECREATE_SHARD):
                end = self._locate_rows(file)
        if self._file.size < end:
            raise StoreError(f"{path}: truncated: {self._file.size} bytes instead of {end}", RECREATE_SHARD)

    def _locate_rows(self, file: h5py.File) -> int:
        """Read the shapes and attributes, check that they agree, and return the end of the last row in bytes."""
        features = get_dataset(file, "features")
        self.shape: tuple[int, ...] = features.shape
        self.codec = codec_of(features.dtype, locate_compressed_rows(features) is not None)
        self.dtype = self.codec.read
        datasets = self.codec.datasets(self.shape[1:])
        self.views = tuple(view for name in sorted(file) if (view := view_of_dataset(name)) is not None)
        end = 0
        for view in self.views:
            for name, (row_shape, kind) in datasets.items():
                dataset = get_dataset(file, dataset_name(name, view))
                if (dataset.shape[1:], dataset.dtype) != (row_shape, kind):
                    raise ValueError(f"{dataset_name(name, view)} has shape {dataset.shape} and type {dataset.dtype}")
                offset = dataset.id.get_offset() if dataset.chunks is None else None
                self._offsets[dataset_name(name, view)] = offset
                end = max(end, 0 if offset is None else offset + dataset.nbytes)
                if dataset.chunks is not None and (chunks := locate_compressed_rows(dataset)) is not None:
                    self._chunks[dataset_name(name, view)] = chunks
                    end = max([end, *(start + size for start, size in chunks)])
        columns = ["image_id", "file_name", "valid", *(dataset_name("crc32", view) for view in self.views)]
        if {len(get_dataset(file, name)) for name in [*columns, *self._offsets]} != {self.shape[0]}:
            raise ValueError("its datasets have different lengths")
        if len(get_dataset(file, "invalid_row")) != len(get_dataset(file, "invalid_reason")):
            raise ValueError("its table of invalid images has columns of different lengths")
        self.index, self.plan = read_attribute(file, "index"), read_attribute(file, "plan")
        read_json_attribute(file, "provenance")
        return end

    def __len__(self) -> int:
        return self.shape[0]

    @functools.cached_property
    def image_id(self) -> np.ndarray:
        """Image ids, (n,) int64."""
        with self._reading() as file:
            return read_column(file, "image_id", "i")

    @functools.cached_property
    def file_name(self) -> list[str]:
        """Paths of the n images relative to the image folder."""
        with self._reading() as file:
            return read_texts(file, "file_name")

    @functools.cached_property
    def valid(self) -> np.ndarray:
        """Which images are valid, (n,) bool."""
        with self._reading() as file:
            return read_column(file, "valid", "bui").astype(bool)

    @functools.cached_property
    def invalid_reasons(self) -> dict[int, str]:
        """Row -> reason, for the invalid images."""
        with self._reading() as file:
            rows = read_column(file, "invalid_row", "i").tolist()
            return dict(zip(rows, read_texts(file, "invalid_reason"), strict=True))

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """Source of the grids: encoder, weights, preprocessing, and so on."""
        with self._reading() as file:
            return read_json_attribute(file, "provenance")

    @functools.cached_property
    def checksums(self) -> dict[str, np.ndarray]:
        """View -> CRC-32 of each row, (n,) uint32."""
        with self._reading() as file:
            return {view: read_column(file, dataset_name("crc32", view), "ui") for view in self.views}

    @functools.cached_property
    def batch_size(self) -> int | None:
        """Number of images that the encoder computed at a time, at least; None if it is not recorded."""
        with self._reading() as file:
            value = read_attribute(file, "batch_size", "")
            return int(value) if value != "" else None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[h5py.File]:
        """Open the file to read a column; corrupted content raises a StoreError."""
        with open_hdf5(self.path) as file, corruption_as_store_error(self.path, "shard", RECREATE_SHARD):
            yield file

    def read_row(self, row: int, out: np.ndarray, view: str = ORIGINAL, verify: bool = False) -> None:
        """Read one grid.

        Args:
            row: from 0 to n - 1.
            out: contiguous array of shape grid_shape and type `dtype` to fill.
            view: name of the view.
            verify: compare the bytes with their checksum.

        Raises:
            StoreError: the file ends before the row does, or the checksum differs.
            StoreAccessError: the system could not read the file.
        """
        if self.codec.stored == self.codec.read:
            self._read(dataset_name("features", view), row, out)
            parts = [out]
        else:
            parts = self.stored_parts(row, view)
        if verify and _crc32(parts) != self.checksums[view][row]:
            raise StoreError(f"{self.path}: row {row} is corrupted: its checksum differs", _REPAIR)
        if parts[0] is not out:
            self.codec.decode(parts, out)

    def row_crc32(self, row: int, view: str = ORIGINAL) -> int:
        """Return the CRC-32 of the stored bytes of a row.

        Raises:
            StoreError: the file ends before the row does.
            StoreAccessError: the system could not read the file.
        """
        return _crc32(self.stored_parts(row, view))

    def stored_parts(self, row: int, view: str = ORIGINAL) -> list[np.ndarray]:
        """Return a row as it is stored, uncompressed: one array per dataset of the codec."""
        parts = []
        for name, (shape, kind) in self.codec.datasets(self.shape[1:]).items():
            parts.append(np.empty(shape, kind))
            self._read(dataset_name(name, view), row, parts[-1])
        return parts

    def _read(self, name: str, row: int, out: np.ndarray) -> None:
        offset = self._offsets[name]
        if name in self._chunks:
            self._read_compressed(name, row, out)
        elif offset is None:
            self._read_through_h5py(name, row, out)
        elif not self._file.read_into(out.data.cast("B"), offset + row * out.nbytes):
            raise StoreError(f"{self.path}: ends inside row {row}", RECREATE_SHARD)

    def _read_compressed(self, name: str, row: int, out: np.ndarray) -> None:
        start, size = self._chunks[name][row]
        data = bytearray(size)
        if not self._file.read_into(memoryview(data), start):
            raise StoreError(f"{self.path}: ends inside row {row}", RECREATE_SHARD)
        if not decompress(bytes(data), out):
            raise StoreError(f"{self.path}: row {row} is corrupted: it cannot be decompressed", _REPAIR)

    def _read_through_h5py(self, name: str, row: int, out: np.ndarray) -> None:
        with open_lock():
            if self._rewritten is None:
                self._rewritten = open_hdf5(self.path)
                for dataset in self._offsets:
                    require_filters(self._rewritten[dataset], self.path)
        with corruption_as_store_error(self.path, f"row {row}", RECREATE_SHARD):
            self._rewritten[name].read_direct(out, np.s_[row])

    def corrupted_rows(self) -> list[int]:
        """Return the rows whose bytes, in any view, do not match their CRC-32."""
        return [row for row in range(len(self)) if any(self._differs(row, v, c) for v, c in self.checksums.items())]

    def _differs(self, row: int, view: str, checksums: np.ndarray) -> bool:
        try:
            return self.row_crc32(row, view) != int(checksums[row])
        except StoreAccessError:
            raise
        except StoreError:
            return True

    def close(self) -> None:
        """Close the file. The next read opens it again."""
        self._file.close()
        if self._rewritten is not None:
            self._rewritten.close()
            self._rewritten = None

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rewritten": None}


def _crc32(parts: Iterable[np.ndarray]) -> int:
    crc = 0
    for part in parts:
        crc = crc32(part.data, crc)
    return crc
