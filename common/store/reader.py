"""The feature store: many shards as one array, and the index file that says it is complete.

The index (`features/train.h5`) is a plain HDF5 file:

    image_id, file_name, valid     of all rows, as in the shards
    reject_row, reject_why         of all rows
    shard_name, shard_rows, shard_sha256
    features                       for other people's code: a virtual dataset over the shards, fill value NaN;
                                   features_hflip, ... for more views, scale for uint8
    attributes                     format = "gridcap-index", version, split, plan, provenance (JSON)

Our own reader never goes through the virtual dataset: HDF5 hides a missing source behind the fill value.
A single shard is a store too.

Written and read for a hundred million rows as for ten: the writer goes through the images in blocks and reads of
each shard only its header; the reader hashes the index once, holds ids and validity (9 bytes a row), reads names
when asked for one, and keeps a bounded number of shards open.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, overload

import h5py
import numpy as np

from gridcap.common.errors import StoreError
from gridcap.common.store.hdf5 import corruption_as_store_error
from gridcap.common.store.index import INDEX_FORMAT, REMAKE, open_index, read_headers
from gridcap.common.store.pinned_file import PinnedFile
from gridcap.common.store.shard import (
    ORIGINAL,
    SHARD_FORMAT,
    ShardReader,
    decode_texts,
    read_dtype,
    read_header,
)

_OPEN_SHARDS = 256  # a quarter of the descriptors that a process usually has


class _Names(Sequence[str]):
    """The file names of an index, read from the file as they are asked for."""

    def __init__(self, path: Path, offset: int, length: int, rows: int) -> None:
        self._file, self._offset, self._length, self._rows = PinnedFile(path), offset, length, rows

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(self._rows))]
        row = range(self._rows)[row]
        text = bytearray(self._length)
        if not self._file.read_into(memoryview(text), self._offset + row * self._length):
            raise StoreError(f"{self._file.path}: ends inside its file names", REMAKE)
        with corruption_as_store_error(self._file.path):
            return text.rstrip(b"\0").decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def close(self) -> None:
        self._file.close()


class FeatureStore:
    """Reads a feature store by row or by image id, in threads, past HDF5's lock.

    Args:
        path: the index file, or a single shard.

    Attributes:
        image_ids: (n,) int64.
        file_names: n paths below the image folder, a sequence.
        valid: (n,) bool; false for a refused image, whose row is NaN.
        rejects: row -> reason, for the refused images.
        grid_shape: of one row, (row, column, channel).
        stored: the type in the files.
        dtype: of one row as it is returned; a uint8 store returns float16.
        shard_paths: its shards' files, in the order of their rows.
        views: of each image, "original" first.
        provenance: encoder, weights, preprocessing, ...: where the numbers come from.
        split: the name of the split, or "".

    Raises:
        StoreError: missing, incomplete, damaged, or of another format.
    """

    def __init__(self, path: Path, threads: int = 2) -> None:
        self.path = path
        if not path.exists() and path.with_suffix("").is_dir():
            raise StoreError(
                f"{path}: not complete yet: its shards are in {path.with_suffix('')}, the index is not written",
                "run the same extract-features command again: it makes just what is missing",
            )
        with open_index(path, INDEX_FORMAT, SHARD_FORMAT) as (file, found):
            single = found == SHARD_FORMAT
            self.split = str(file.attrs.get("split", ""))
            self.provenance: dict[str, Any] = json.loads(file.attrs["provenance"])
            self.grid_shape: tuple[int, ...] = tuple(self.provenance["grid_shape"])
            self.stored = np.dtype(self.provenance["dtype"])
            self.dtype = read_dtype(self.stored)
            self.views: tuple[str, ...] = tuple(self.provenance.get("views", [ORIGINAL]))
            self.image_ids: np.ndarray = file["image_id"][:]
            self.valid: np.ndarray = file["valid"][:].astype(bool)
            why = decode_texts(file["reject_why"])
            self.rejects: dict[int, str] = dict(zip(file["reject_row"][:].tolist(), why, strict=True))
            self.file_names: Sequence[str] = self._names(file)
            names, sizes, hashes = [path.name], [len(self.image_ids)], [""]
            if not single:
                names, sizes = decode_texts(file["shard_name"]), file["shard_rows"][:].tolist()
                hashes = decode_texts(file["shard_sha256"])
        self.shard_paths = [self._inside(name) for name in names]
        self._starts = np.cumsum([0, *sizes])
        if not len(self.image_ids) == len(self.valid) == len(self.file_names) == self._starts[-1]:
            raise StoreError(f"{path}: its columns have different lengths", REMAKE)
        self._hashes = hashes
        if not single:
            self._check_shards(sizes)
        self._process = os.getpid()
        self._readers: dict[int, ShardReader] = {}
        self._opened: OrderedDict[int, None] = OrderedDict()  # shards with an open file, the one used last at the end
        self._in_use: dict[int, int] = {}
        self._lock = threading.Lock()
        self._by_id: tuple[np.ndarray, np.ndarray] | None = None
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def _names(self, file: h5py.File) -> Sequence[str]:
        column = file["file_name"]
        if column.chunks is not None:  # an index that other tools rewrote
            return decode_texts(column)
        return _Names(self.path, column.id.get_offset(), column.dtype.itemsize, len(column))

    def _inside(self, name: str) -> Path:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise StoreError(f"{self.path}: its shard {name!r} lies outside of its folder", "extract again")
        return self.path.parent / name

    def _check_shards(self, sizes: Sequence[int]) -> None:
        """Make sure that every shard is there, whole, and the one that was indexed."""
        for shard, (path, info) in enumerate(zip(self.shard_paths, read_headers(self.shard_paths), strict=True)):
            if info is None:  # rewritten by other tools
                self._open(shard)
            elif info.index != shard:
                raise StoreError(f"{path}: stands in another shard's place", "extract again")
            elif info.rows != sizes[shard]:
                raise StoreError(f"{path}: has {info.rows} rows, and the index says {sizes[shard]}", "extract again")
            elif info.sha256 != self._hashes[shard]:
                raise self._foreign(shard)

    def _foreign(self, shard: int) -> StoreError:
        return StoreError(
            f"{self.shard_paths[shard]}: belongs to another store than {self.path}",
            "run the same extract-features command again: it writes the index anew",
        )

    def _open(self, shard: int) -> ShardReader:
        info, reader = read_header(self.shard_paths[shard]), ShardReader(self.shard_paths[shard])
        if self._hashes[shard] and info is not None and info.sha256 != self._hashes[shard]:
            raise self._foreign(shard)
        if (reader.shape[1:], reader.dtype, set(reader.views)) != (self.grid_shape, self.dtype, set(self.views)):
            raise StoreError(f"{reader.path}: holds other grids than {self.path} says", "extract again")
        if len(reader) != self._starts[shard + 1] - self._starts[shard]:
            raise StoreError(f"{reader.path}: has another number of rows than the index says", "extract again")
        if len(self.shard_paths) > 1 and reader.index != shard:
            raise StoreError(f"{reader.path}: stands in another shard's place", "extract again")
        return reader

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, row: int, view: str = ORIGINAL) -> np.ndarray:
        """One grid, (*grid_shape). A refused image's is all NaN: see `valid`."""
        grid: np.ndarray = self.rows([row], views=[self.views.index(view)])[0]
        return grid

    def rows(
        self,
        rows: Iterable[int],
        out: np.ndarray | None = None,
        views: Sequence[int] | np.ndarray | None = None,
        check: bool = False,
    ) -> np.ndarray:
        """Grids of any rows in any order.

        Args:
            rows: row numbers from 0.
            out: a contiguous (m, *grid_shape) array of `dtype` to fill; None makes one.
            views: for each row, which of the store's `views`, by number; None: the original of all.
            check: compare every row with its checksum (a tenth of a millisecond for 8 x 8 x 2048 in float16).

        Returns:
            (m, *grid_shape) of `dtype`.

        Raises:
            IndexError: a row or a view outside of the store.
            StoreError: a shard is gone, or was cut short since it was opened; or a checked row is damaged.
        """
        wanted = np.asarray(list(rows), np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"{self.path}: rows go from 0 to {len(self) - 1}")
        if out is None:
            out = np.empty((len(wanted), *self.grid_shape), self.dtype)
        elif (out.shape, out.dtype) != ((len(wanted), *self.grid_shape), self.dtype) or not out.flags.c_contiguous:
            raise ValueError(f"out must be a contiguous {(len(wanted), *self.grid_shape)} array of {self.dtype}")
        chosen = [self.views[view] for view in ([0] * len(wanted) if views is None else views)]
        places = np.searchsorted(self._starts, wanted, side="right") - 1
        shards, inside = places.tolist(), (wanted - self._starts[places]).tolist()
        self._after_fork()
        with self._using(shards) as readers:

            def read(part: range) -> None:
                for i in part:
                    readers[shards[i]].read_row(inside[i], out[i], chosen[i], check)

            if self._threads == 1 or len(wanted) < 2 * self._threads:
                read(range(len(wanted)))
            else:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(self._threads, "store")
                list(self._pool.map(read, [range(i, len(wanted), self._threads) for i in range(self._threads)]))
        return out

    def _after_fork(self) -> None:
        """A forked child has none of its parent's threads: what they held and used must be made anew."""
        if self._process != os.getpid():
            self._process, self._pool, self._lock, self._in_use = os.getpid(), None, threading.Lock(), {}

    def scales(self, row: int) -> np.ndarray:
        """The scales of a uint8 store's row, (channel,) float16: the width of its levels."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._using([shard]) as readers:
            return readers[shard].stored_parts(row - int(self._starts[shard]))[1]

    @contextmanager
    def _using(self, shards: Sequence[int]) -> Iterator[dict[int, ShardReader]]:
        """The readers of some shards, kept open while they are used; of the others only a bounded number is."""
        used: dict[int, ShardReader] = {}
        try:
            with self._lock:
                for shard in dict.fromkeys(shards):
                    if shard not in self._readers:
                        self._readers[shard] = self._open(shard)
                    used[shard] = self._readers[shard]
                    self._opened[shard] = None
                    self._opened.move_to_end(shard)
                    self._in_use[shard] = self._in_use.get(shard, 0) + 1
                idle = itertools.filterfalse(self._in_use.get, self._opened)
                for shard in list(itertools.islice(idle, max(0, len(self._opened) - _OPEN_SHARDS))):
                    self._readers[shard].close()
                    del self._opened[shard]
            yield used
        finally:
            with self._lock:
                for shard in used:
                    self._in_use[shard] -= 1
                    if not self._in_use[shard]:
                        del self._in_use[shard]

    def row_of_image(self, image_id: int) -> int:
        """The row of an image.

        Raises:
            KeyError: no such image in this store.
            StoreError: two images share an id.
        """
        if self._by_id is None:
            order = np.argsort(self.image_ids, kind="stable")
            ids = self.image_ids[order]
            if len(twice := np.flatnonzero(ids[1:] == ids[:-1])):
                a, b = (self.file_names[int(order[twice[0] + i])] for i in (0, 1))
                raise StoreError(f"{self.path}: {a} and {b} share the image id {ids[twice[0]]}", "extract again")
            self._by_id = ids, order
        ids, order = self._by_id
        place = int(np.searchsorted(ids, image_id))
        if place == len(ids) or ids[place] != image_id:
            raise KeyError(image_id)
        return int(order[place])

    def by_image_id(self, image_id: int) -> np.ndarray:
        """The grid of an image, (*grid_shape). Raises KeyError if the store does not have it."""
        return self.row(self.row_of_image(image_id))

    def close(self) -> None:
        """Close files and threads; the next read opens them again."""
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._opened.clear()
        if isinstance(self.file_names, _Names):
            self.file_names.close()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {"_pool": None, "_lock": None, "_opened": OrderedDict(), "_in_use": {}}
        return {**self.__dict__, **fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
