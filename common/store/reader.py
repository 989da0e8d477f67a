"""The feature store: many shards read as one array."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gridcap.common.errors import InvalidImageError, StoreError
from gridcap.common.store.file_names import FileNames
from gridcap.common.store.index_reader import INDEX_FORMAT, StoreIndex, read_index
from gridcap.common.store.open_shards import OpenShards
from gridcap.common.store.selection import Rows, select_rows
from gridcap.common.store.shard_format import ORIGINAL, SHARD_FORMAT
from gridcap.common.store.shard_reader import ShardReader
from gridcap.common.store.shard_table import ShardTable

if TYPE_CHECKING:
    from gridcap.common.store.dataset import FeatureDataset


@dataclass(frozen=True)
class _Request:
    """Rows to read: for each position in `out`, its shard, its row in that shard, and its view."""

    shards: list[int]
    inside: list[int]
    views: list[str]
    out: np.ndarray
    verify: bool

    def read(self, positions: Sequence[int], readers: Mapping[int, ShardReader]) -> None:
        """Read the rows at some positions into `out`."""
        for i in positions:
            readers[self.shards[i]].read_row(self.inside[i], self.out[i], self.views[i], self.verify)


class FeatureStore:
    """Random access to the grids of a feature store.

    Indexing follows NumPy: `store[17]` is one grid; `store[2:5]`, `store[[3, 5, 8]]`, and `store[mask]` are arrays of
    grids. Rows are read by several threads, outside HDF5's global lock. Reading an invalid image raises an error;
    `rows` reads it on request. A store can be pickled and survives a fork; each process opens its own files.

    Example:
        >>> store = FeatureStore("features/train.h5")
        >>> grids = store[[3, 5, 8]]
        >>> for grids, ids in store.batches(64): ...

    Args:
        path: the index file, or a single shard.
        num_threads: threads that read the rows of one call.

    Attributes:
        path: the index file.
        image_id: (n,) int64.
        file_name: paths of the n images relative to the image folder, a sequence.
        valid: (n,) bool; False for an invalid image, whose stored grid is NaN.
        invalid_reasons: row -> reason, for the invalid images.
        grid_shape: shape of one grid, (row, column, channel).
        codec: how grids are stored.
        dtype: type of the grids that are returned; float16 for a uint8 store.
        shard_paths: paths of the shards in row order.
        views: views of each image; "original" comes first.
        provenance: source of the grids: encoder, weights, preprocessing, and so on.
        split: name of the split, or "".

    Raises:
        StoreError: the store is missing, incomplete, corrupted, or of another format.
        StoreAccessError: the system could not read a file.
    """

    def __init__(self, path: str | Path, num_threads: int = 2) -> None:
        self.path = path = Path(path)
        index = _read_index(path)
        self.split, self.provenance = index.split, index.provenance
        self.image_id, self.file_name = index.image_id, index.file_name
        self.valid, self.invalid_reasons = index.valid, index.invalid_reasons
        self.grid_shape, self.views = index.layout.grid_shape, index.layout.views
        self.codec, self.dtype = index.layout.codec, index.layout.dtype
        self._table = ShardTable(path, index)
        self.shard_paths = self._table.paths
        self._shards = OpenShards(self._table)
        self._num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None
        self._pool_process = os.getpid()
        self._sorted_ids: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.image_id)

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, images={len(self)}, grid_shape={self.grid_shape})"

    def __getitem__(self, rows: int | np.integer[Any] | Rows) -> np.ndarray:
        """Return one grid (grid_shape) for an integer, or m grids (m, *grid_shape) for any other selection.

        Raises:
            IndexError: a row is out of range, or a mask has another length.
            InvalidImageError: an image is invalid.
            StoreError: a shard is missing or was truncated since the store was opened.
        """
        if isinstance(rows, bool | tuple):
            raise IndexError(f"rows must be a slice, integers, or a boolean mask, got {rows!r}")
        if isinstance(rows, int | np.integer):
            grid: np.ndarray = self.rows([int(rows)])[0]
            return grid
        return self.rows(rows)

    def rows(
        self,
        rows: Rows,
        *,
        views: str | Sequence[int] | np.ndarray = ORIGINAL,
        out: np.ndarray | None = None,
        verify: bool = False,
        allow_invalid: bool = False,
    ) -> np.ndarray:
        """Read grids with more options than indexing.

        Args:
            rows: a slice, integers in any order, or a boolean mask.
            views: name of a view, or for each row the position of its view in `views`.
            out: contiguous (m, *grid_shape) array of `dtype` to fill.
            verify: compare each row with its checksum (about 0.1 ms for 8 x 8 x 2048 in float16).
            allow_invalid: read invalid images too; their grids are NaN.

        Returns:
            Grids, (m, *grid_shape) of `dtype`.

        Raises:
            IndexError: a row or a view is out of range.
            InvalidImageError: an image is invalid, and `allow_invalid` is False.
            StoreError: a shard is missing or was truncated since the store was opened, or a checksum differs.
            StoreAccessError: the system could not read a shard.
        """
        selected = select_rows(rows, len(self))
        if not allow_invalid and not self.valid[selected].all():
            raise self._invalid_image(int(selected[~self.valid[selected]][0]))
        view_names = self._view_names(views, len(selected))
        shape = (len(selected), *self.grid_shape)
        if out is None:
            out = np.empty(shape, self.dtype)
        elif (out.shape, out.dtype) != (shape, self.dtype) or not out.flags.c_contiguous:
            raise ValueError(f"out must be a contiguous array of shape {shape} and type {self.dtype}")
        shards, inside = self._table.locate(selected)
        request = _Request(shards, inside, view_names, out, verify)
        for positions in self._groups(shards):
            with self._shards.borrow([shards[i] for i in positions]) as readers:
                self._read(request, positions, readers)
        return out

    def _invalid_image(self, row: int) -> InvalidImageError:
        reason = self.invalid_reasons.get(row, "unknown reason")
        return InvalidImageError(
            f"{self.path}: row {row} ({self.file_name[row]}) is an invalid image: {reason}",
            "select valid images, as in store[store.valid], or pass allow_invalid=True to rows()",
        )

    def _view_names(self, views: str | Sequence[int] | np.ndarray, count: int) -> list[str]:
        if isinstance(views, str):
            if views not in self.views:
                raise StoreError(
                    f"{self.path}: has no view {views!r}", f"choose one of its views: {', '.join(self.views)}"
                )
            return [views] * count
        positions = np.asarray(views).tolist()
        if len(positions) != count:
            raise IndexError(f"got {len(positions)} views for {count} rows")
        if positions and not (min(positions) >= 0 and max(positions) < len(self.views)):
            raise IndexError(f"views must be from 0 to {len(self.views) - 1}")
        return [self.views[position] for position in positions]

    def _groups(self, shards: Sequence[int]) -> list[Sequence[int]]:
        """Divide the positions of a read into groups that use at most `max_open` shards each."""
        distinct = list(dict.fromkeys(shards))
        size = self._shards.max_open
        if len(distinct) <= size:
            return [range(len(shards))]
        group_of = {shard: i // size for i, shard in enumerate(distinct)}
        groups: list[list[int]] = [[] for _ in range(0, len(distinct), size)]
        for position, shard in enumerate(shards):
            groups[group_of[shard]].append(position)
        return list(groups)

    def _read(self, request: _Request, positions: Sequence[int], readers: Mapping[int, ShardReader]) -> None:
        """Read some positions of a request, divided among the threads if there are enough of them."""
        threads = self._num_threads
        if threads == 1 or len(positions) < 2 * threads:
            request.read(positions, readers)
            return
        if self._pool is None or self._pool_process != os.getpid():  # a forked process has none of the threads
            self._pool, self._pool_process = ThreadPoolExecutor(threads, "store"), os.getpid()
        parts = [positions[i::threads] for i in range(threads)]
        list(self._pool.map(request.read, parts, [readers] * threads))

    def batches(
        self, batch_size: int, *, view: str = ORIGINAL, allow_invalid: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over the valid images in row order.

        Args:
            batch_size: images per batch; the last batch may be smaller.
            view: name of the view.
            allow_invalid: include invalid images; their grids are NaN.

        Yields:
            Grids, (b, *grid_shape) of `dtype`, and image ids, (b,) int64.

        Raises:
            ValueError: `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        selected = np.arange(len(self)) if allow_invalid else np.flatnonzero(self.valid)
        for start in range(0, len(selected), batch_size):
            part = selected[start : start + batch_size]
            yield self.rows(part, views=view, allow_invalid=allow_invalid), self.image_id[part]

    def as_dataset(self, view: str = ORIGINAL) -> FeatureDataset:
        """Return the valid images as a PyTorch dataset of (grid, image_id), for a `DataLoader` with workers."""
        from gridcap.common.store.dataset import FeatureDataset

        return FeatureDataset(self, view)

    def row_of_image(self, image_id: int) -> int:
        """Return the row of an image.

        Raises:
            KeyError: the store does not contain the image.
            StoreError: two images have the same id.
        """
        if self._sorted_ids is None:
            order = np.argsort(self.image_id, kind="stable")
            ids = self.image_id[order]
            if len(repeated := np.flatnonzero(ids[1:] == ids[:-1])):
                first, second = (self.file_name[int(order[repeated[0] + i])] for i in (0, 1))
                raise StoreError(
                    f"{self.path}: {first} and {second} have the same image id {ids[repeated[0]]}",
                    "give each image its own id in the captions file, and extract again",
                )
            self._sorted_ids = ids, order
        ids, order = self._sorted_ids
        position = int(np.searchsorted(ids, image_id))
        if position == len(ids) or ids[position] != image_id:
            raise KeyError(image_id)
        return int(order[position])

    def channel_scales(self, row: int) -> np.ndarray:
        """Return the quantization step of each channel in a row of a uint8 store, (channels,) float16."""
        (shard,), (inside,) = self._table.locate(select_rows([row], len(self)))
        with self._shards.borrow([shard]) as readers:
            return readers[shard].stored_parts(inside)[1]

    def close(self) -> None:
        """Close files and threads. The next read opens them again."""
        if self._pool is not None and self._pool_process == os.getpid():
            self._pool.shutdown()
        self._pool = None
        self._shards.close()
        if isinstance(self.file_name, FileNames):
            self.file_name.close()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


def _read_index(path: Path) -> StoreIndex:
    """Read an index, or a single shard; a store whose index is not written yet has an error of its own."""
    try:
        return read_index(path, (INDEX_FORMAT, SHARD_FORMAT))
    except StoreError as error:
        folder = path.with_suffix("")
        if not isinstance(error.__cause__, FileNotFoundError) or not folder.is_dir():
            raise
        raise StoreError(
            f"{path}: not complete yet: {folder} exists, but the index does not",
            "run the same extract-features command again: it writes only what is missing",
        ) from error
