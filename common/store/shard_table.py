"""Shard table of a store: where the shards are, and whether they are the ones that were indexed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from gridcap.common.errors import StoreError
from gridcap.common.store.index_reader import INDEX_FORMAT, StoreIndex, read_headers
from gridcap.common.store.shard_format import RECREATE_INDEX, RECREATE_SHARD, GridLayout, ShardInfo, read_header
from gridcap.common.store.shard_reader import ShardReader


class ShardTable:
    """Paths and identities of the shards of a store.

    Args:
        path: the index file, or a single shard.
        index: its content.

    Attributes:
        paths: paths of the shards in row order.
        starts: first row of each shard and, at the end, the number of rows; (shards + 1,) int64.

    Raises:
        StoreError: a shard is missing, corrupted, outside the folder of the index, or not the one that was indexed.
        StoreAccessError: the system could not read a shard.
    """

    def __init__(self, path: Path, index: StoreIndex) -> None:
        self._path = path
        self._layout: GridLayout = index.layout
        self._sha256 = index.shard_sha256
        self.paths = _locate(path, index.shard_names)
        self.starts = np.cumsum([0, *index.shard_rows], dtype=np.int64)
        if index.format == INDEX_FORMAT:
            self._check_shards()

    def _check_shards(self) -> None:
        """Check that every shard is present, complete, and the one that was indexed."""
        try:
            headers = read_headers(self.paths)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise StoreError(
                    error.message,
                    f"keep {self._path.name} next to the folder of its shards when you move or link it; if the shard "
                    "is lost, run the same extract-features command again: it writes only what is missing",
                ) from error
            raise
        for shard, info in enumerate(headers):
            if info is None:  # rewritten by another program
                self.open(shard)
            else:
                self._check_header(shard, info)

    def _check_header(self, shard: int, info: ShardInfo) -> None:
        path, rows = self.paths[shard], int(self.starts[shard + 1] - self.starts[shard])
        if info.index != shard:
            raise StoreError(f"{path}: is shard {info.index}, not {shard}", RECREATE_SHARD)
        if info.rows != rows:
            raise StoreError(f"{path}: has {info.rows} rows, but the index has {rows}", RECREATE_SHARD)
        if info.sha256 != self._sha256[shard]:
            raise StoreError(f"{path}: belongs to another store than {self._path}", RECREATE_INDEX)

    def open(self, shard: int) -> ShardReader:
        """Open a shard and check that it is the one that was indexed.

        Raises:
            StoreError: the shard is missing, corrupted, or another one.
            StoreAccessError: the system could not read the shard.
        """
        path, rows = self.paths[shard], int(self.starts[shard + 1] - self.starts[shard])
        info = read_header(path) if self._sha256[shard] else None
        reader = ShardReader(path)
        if info is not None:
            self._check_header(shard, info)
        layout = GridLayout(reader.shape[1:], reader.codec, reader.views)
        expected = self._layout
        if (layout.grid_shape, layout.codec.stored) != (expected.grid_shape, expected.codec.stored) or (
            set(layout.views) != set(expected.views)
        ):
            raise StoreError(f"{path}: its grids do not have the layout that {self._path} states", RECREATE_SHARD)
        if len(reader) != rows:
            raise StoreError(f"{path}: has {len(reader)} rows, but the index has {rows}", RECREATE_SHARD)
        if len(self.paths) > 1 and reader.index != shard:
            raise StoreError(f"{path}: is shard {reader.index}, not {shard}", RECREATE_SHARD)
        return reader

    def locate(self, rows: np.ndarray) -> tuple[list[int], list[int]]:
        """Return the shard of each row and the row within that shard.

        Args:
            rows: (m,) int64, row numbers of the store.
        """
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        return shards.tolist(), (rows - self.starts[shards]).tolist()


def _locate(path: Path, names: Sequence[str]) -> list[Path]:
    """Return the paths of the shards, which are relative to the index, or to the target of a link to the index."""
    for name in names:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise StoreError(f"{path}: its shard {name!r} is outside its folder", RECREATE_INDEX)
    folder = path.parent
    if path.is_symlink() and names and not (folder / names[0]).exists():
        folder = path.resolve().parent
    return [folder / name for name in names]
