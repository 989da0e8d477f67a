"""The feature store: many shards as one array, and the index file that says it is complete.

The index (`features/train.h5`) is a plain HDF5 file:

    image_id, file_name, valid     of all rows, as in the shards
    shard_name, shard_rows, shard_sha256
    features                       for other people's code: a virtual dataset over the shards, fill value NaN
    attributes                     format = "gridcap-index", version, split, plan, provenance (JSON)

Our own reader never goes through the virtual dataset: HDF5 hides a missing source behind the fill value.
A single shard is a store too.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from common.errors import MismatchError, StoreError
from common.files import replacing
from common.shard import (
    SHARD_FORMAT,
    VERSION,
    ShardInfo,
    ShardReader,
    check_format,
    decode_texts,
    open_hdf5,
    text_array,
)

INDEX_FORMAT = "gridcap-index"


def write_index(
    path: Path, folder: Path, shards: Sequence[ShardInfo], split: str, plan: str, provenance: dict[str, Any]
) -> None:
    """Write the index over finished shards; its presence means that the store is complete.

    Args:
        path: the index file.
        folder: where the shards are, below the index's folder.
        shards: in the order of their rows.
        split, plan, provenance: kept as attributes.
    """
    readers = [ShardReader(folder / shard.name) for shard in shards]
    with replacing(path) as temporary, h5py.File(temporary, "x", locking=False) as file:
        _virtual_features(file, path.parent, readers)
        file["image_id"] = np.concatenate([r.image_ids for r in readers])
        file["file_name"] = text_array(list(itertools.chain.from_iterable(r.file_names for r in readers)))
        file["valid"] = np.concatenate([r.valid for r in readers])
        file["shard_name"] = text_array([reader.path.relative_to(path.parent).as_posix() for reader in readers])
        file["shard_rows"] = np.array([len(r) for r in readers], "<i8")
        file["shard_sha256"] = text_array([shard.sha256 for shard in shards])
        file.attrs.update({"format": INDEX_FORMAT, "version": VERSION, "split": split, "plan": plan})
        file.attrs["provenance"] = json.dumps(provenance, sort_keys=True)


def _virtual_features(file: h5py.File, base: Path, readers: Sequence[ShardReader]) -> None:
    """Make the virtual dataset over all shards.

    With HDF5's own calls, because h5py's `create_virtual_dataset` records the time of making, and the same
    store must give the same bytes.
    """
    grid = readers[0].shape[1:]
    rows = sum(len(reader) for reader in readers)
    space = h5py.h5s.create_simple((rows, *grid))
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    properties.set_fill_value(np.array(np.nan, readers[0].dtype))
    start = 0
    for reader in readers:
        part = space.copy()
        part.select_hyperslab((start, *(0 for _ in grid)), reader.shape)
        name = reader.path.relative_to(base).as_posix().replace("%", "%%").encode()  # HDF5 knows "%b" there
        properties.set_virtual(part, name, b"features", h5py.h5s.create_simple(reader.shape))
        start += len(reader)
    h5py.h5d.create(file.id, b"features", h5py.h5t.py_create(readers[0].dtype), space, dcpl=properties)


class FeatureStore:
    """Reads a feature store by row or by image id, in threads, past HDF5's lock.

    Args:
        path: the index file, or a single shard.

    Attributes:
        image_ids: (n,) int64.
        file_names: n paths below the image folder.
        valid: (n,) bool; false for a refused image, whose row is NaN.
        grid_shape: of one row, (row, column, channel).
        dtype: of one row.
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
        with open_hdf5(path) as file:
            if check_format(file, path, INDEX_FORMAT, SHARD_FORMAT) == SHARD_FORMAT:
                names, rows = [path.name], None
            else:
                try:
                    names, rows = decode_texts(file["shard_name"]), file["shard_rows"][:].tolist()
                except (KeyError, ValueError, OSError) as error:
                    raise StoreError(f"{path}: not a sound index: {error}", "delete it and extract again") from error
            self.split = str(file.attrs.get("split", ""))
            try:
                self.provenance: dict[str, Any] = json.loads(file.attrs["provenance"])
            except (KeyError, ValueError, OSError) as error:
                raise StoreError(f"{path}: no provenance: {error}", "delete it and extract again") from error
            plan = file.attrs.get("plan")
        self._shards = [self._open(name, plan) for name in names]
        if rows is not None and [s.attributes.get("index") for s in self._shards] != list(range(len(names))):
            wrong = next(s.path for i, s in enumerate(self._shards) if s.attributes.get("index") != i)
            raise StoreError(f"{wrong}: stands in another shard's place", "extract again")
        if rows is not None and rows != [len(s) for s in self._shards]:
            raise StoreError(f"{path}: its shards have other row counts than the index says", "extract again")
        self._starts = np.cumsum([0, *(len(s) for s in self._shards)])
        self.grid_shape = self._shards[0].shape[1:]
        self.dtype = self._shards[0].dtype
        self.image_ids = np.concatenate([s.image_ids for s in self._shards])
        self.file_names = list(itertools.chain.from_iterable(s.file_names for s in self._shards))
        self.valid = np.concatenate([s.valid for s in self._shards])
        self._row_of_id: dict[int, int] | None = None
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._pool_process = 0

    def _open(self, name: str, plan: object) -> ShardReader:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise StoreError(f"{self.path}: its shard {name!r} lies outside of its folder", "extract again")
        shard = ShardReader(self.path.parent / name)
        if shard.attributes.get("plan") != plan:
            raise StoreError(f"{shard.path}: belongs to another store than {self.path}", "extract again")
        return shard

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, row: int) -> np.ndarray:
        """One grid, (*grid_shape) in the stored type. A refused image's is all NaN: see `valid`."""
        grid: np.ndarray = self.rows([row])[0]
        return grid

    def rows(self, rows: Iterable[int], out: np.ndarray | None = None) -> np.ndarray:
        """Grids of any rows in any order.

        Args:
            rows: row numbers from 0.
            out: a contiguous (m, *grid_shape) array to fill; None makes one.

        Returns:
            (m, *grid_shape) in the stored type.

        Raises:
            IndexError: a row outside of the store.
            StoreError: a shard was cut short since it was opened.
        """
        wanted = np.asarray(list(rows), np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"{self.path}: rows go from 0 to {len(self) - 1}")
        if out is None:
            out = np.empty((len(wanted), *self.grid_shape), self.dtype)
        elif (out.shape, out.dtype) != ((len(wanted), *self.grid_shape), self.dtype) or not out.flags.c_contiguous:
            raise ValueError(f"out must be a contiguous {(len(wanted), *self.grid_shape)} array of {self.dtype}")
        shards = np.searchsorted(self._starts, wanted, side="right") - 1

        def read(part: range) -> None:
            for i in part:
                shard = shards[i]
                self._shards[shard].read_row(int(wanted[i] - self._starts[shard]), out[i])

        if len(wanted) < 2 * self._threads:
            read(range(len(wanted)))
        else:
            if self._pool is None or self._pool_process != os.getpid():  # a forked child has no threads
                self._pool, self._pool_process = ThreadPoolExecutor(self._threads, "store"), os.getpid()
            list(self._pool.map(read, [range(i, len(wanted), self._threads) for i in range(self._threads)]))
        return out

    def row_of_image(self, image_id: int) -> int:
        """The row of an image.

        Raises:
            KeyError: no such image in this store.
        """
        if self._row_of_id is None:
            self._row_of_id = {int(i): row for row, i in enumerate(self.image_ids)}
        return self._row_of_id[image_id]

    def by_image_id(self, image_id: int) -> np.ndarray:
        """The grid of an image, (*grid_shape). Raises KeyError if the store does not have it."""
        return self.row(self.row_of_image(image_id))

    def rejects(self) -> dict[int, str]:
        """Row -> reason, for the refused images."""
        starts = self._starts.tolist()
        return {
            start + row: why for start, s in zip(starts, self._shards, strict=False) for row, why in s.rejects.items()
        }

    def close(self) -> None:
        """Close files and threads; the next read opens them again."""
        for shard in self._shards:
            shard.close()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


# What decides the numbers in a grid; two stores that agree in these can feed one decoder.
MATCHED = ("encoder", "layer", "weights", "preprocessing", "grid_shape", "dtype")


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any], keys: Sequence[str] = MATCHED) -> list[str]:
    """What differs between two provenances, a line a key. Weights are told apart by their SHA-256 alone."""
    lines = []
    for key in keys:
        a, b = wanted.get(key), found.get(key)
        if key == "weights" and isinstance(a, dict) and isinstance(b, dict) and a.get("sha256"):
            if a["sha256"] != b.get("sha256"):
                lines.append(f"{key} {_short(a)} there, {_short(b)} here")
            continue
        if a != b:
            lines.append(f"{key} {_short(a)} there, {_short(b)} here")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value.get('name')} (SHA-256 {str(value['sha256'])[:8]})"
    return json.dumps(value, sort_keys=True)


def check_same_features(wanted: Mapping[str, Any], found: Mapping[str, Any], who: str, what: str) -> None:
    """Make sure that grids come from the same encoder, layer, weights, preprocessing, shape and type.

    Args:
        wanted, found: two provenances.
        who, what: name them in the message: "runs/x was trained on", "features/test.h5 holds".

    Raises:
        MismatchError: with every difference.
    """
    if lines := differences(wanted, found):
        raise MismatchError(
            f"{who} other features than {what}: {'; '.join(lines)}",
            "extract with the same encoder, weights and preprocessing, or train a decoder on these features",
        )
