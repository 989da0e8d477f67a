"""Reader of the index of a store, which is verified against its checksum before HDF5 parses it.

The index (`features/train.h5`) is a plain HDF5 file:

    image_id, file_name, valid     of all rows, as in the shards
    invalid_row, invalid_reason    of all rows
    shard_name, shard_rows, shard_sha256
    features                       for other programs: a virtual dataset over the shards, fill value NaN;
                                   also features_hflip and so on for more views, and scale for uint8
    attributes                     format = "gridcap-index", version, split, plan, provenance (JSON)

Gridcap does not read the virtual datasets: HDF5 hides a missing or unreadable source behind the fill value.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gridcap.common.errors import StoreError
from gridcap.common.files import sha256_of
from gridcap.common.store.file_names import FileNames
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
from gridcap.common.store.header import HEADER_BYTES, format_of, unpack_header
from gridcap.common.store.shard_format import RECREATE_INDEX, SHARD_FORMAT, GridLayout, ShardInfo, read_header
from gridcap.common.store.system_error import store_error_from

INDEX_FORMAT = "gridcap-index"
_VIRTUAL = ("features", "scale")
_HEADER_THREADS = 16  # for file systems on which opening a file takes long


@dataclass(frozen=True)
class StoreIndex:
    """Content of an index, or of a single shard read as a store.

    Attributes:
        format: INDEX_FORMAT or SHARD_FORMAT.
        split: name of the split, or "".
        plan: SHA-256 of the plan that the store belongs to.
        provenance: source of the grids.
        layout: shape, stored type, and views of the grids.
        image_id: (n,) int64.
        file_name: paths of the n images relative to the image folder.
        valid: (n,) bool.
        invalid_reasons: row -> reason, for the invalid images.
        shard_names: paths of the shards relative to the folder of the index; for a single shard, its own name.
        shard_rows: number of rows of each shard.
        shard_sha256: checksum of each shard; "" for a single shard.
    """

    format: str
    split: str
    plan: str
    provenance: dict[str, Any]
    layout: GridLayout
    image_id: np.ndarray
    file_name: Sequence[str]
    valid: np.ndarray
    invalid_reasons: dict[int, str]
    shard_names: list[str]
    shard_rows: list[int]
    shard_sha256: list[str]


def read_index(path: Path, formats: Sequence[str] = (INDEX_FORMAT,)) -> StoreIndex:
    """Read an index after verifying its checksum.

    Args:
        path: the index file.
        formats: accepted formats; with SHARD_FORMAT, a single shard is read as a store.

    Raises:
        StoreError: the file is missing, corrupted, or of another format.
        StoreAccessError: the system could not read the file.
    """
    check_index(path)
    with open_hdf5(path) as file:
        kind = _check_format(file, path, formats)
        with corruption_as_store_error(path, "index", RECREATE_INDEX):
            return _read_content(file, path, kind)


def read_index_plan(path: Path) -> str:
    """Return the SHA-256 of the plan that an index belongs to. Raises as `read_index`."""
    check_index(path)
    with open_hdf5(path) as file:
        _check_format(file, path, (INDEX_FORMAT,))
        with corruption_as_store_error(path, "index", RECREATE_INDEX):
            return str(read_attribute(file, "plan"))


def check_index(path: Path) -> None:
    """Compare an index with the SHA-256 in its header before HDF5 parses it.

    Some flipped bits in the mapping of the virtual datasets crash HDF5 and with it the process. Files without a header
    (rewritten by another program) and shards pass.

    Raises:
        StoreError: the index is corrupted.
        StoreAccessError: the system could not read the file.
    """
    if format_of(path) in (None, SHARD_FORMAT):
        return
    header = unpack_header(path, INDEX_FORMAT, ("size", "sha256"), RECREATE_INDEX)
    try:
        status = path.stat()
        identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        digest = _cached_sha256(path, identity)
    except OSError as error:  # for example, another worker has just removed it
        raise store_error_from(error, path) from error
    if header is not None and header["sha256"] != digest:
        raise StoreError(f"{path}: corrupted: differs from the SHA-256 in its header", RECREATE_INDEX)


@functools.lru_cache(maxsize=64)
def _cached_sha256(path: Path, identity: tuple[int, ...]) -> str:
    """Return the SHA-256 of an index without its header, computed once per file because it is opened repeatedly."""
    return sha256_of(path, HEADER_BYTES)


def read_headers(paths: Sequence[Path]) -> list[ShardInfo | None]:
    """Read the headers of shards concurrently; None for a shard that another program rewrote.

    Raises:
        StoreError: a shard is missing or corrupted.
        StoreAccessError: the system could not read a shard.
    """
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        return list(pool.map(read_header, paths))


def _check_format(file: h5py.File, path: Path, formats: Sequence[str]) -> str:
    kind = check_format(file, path, formats, _VIRTUAL)
    if kind == SHARD_FORMAT:
        check_format(file, path, formats)  # the features of a shard must be its own
    return kind


def _read_content(file: h5py.File, path: Path, kind: str) -> StoreIndex:
    provenance = read_json_attribute(file, "provenance")
    image_id, valid = read_column(file, "image_id", "i"), read_column(file, "valid", "bui").astype(bool)
    reasons = read_texts(file, "invalid_reason")
    shard_names, shard_rows, shard_sha256 = [path.name], [len(image_id)], [""]
    if kind == INDEX_FORMAT:
        shard_names, shard_sha256 = read_texts(file, "shard_name"), read_texts(file, "shard_sha256")
        shard_rows = read_column(file, "shard_rows", "i").tolist()
    file_name = _read_file_names(file, path)
    if not len(image_id) == len(valid) == len(file_name) == sum(shard_rows):
        raise ValueError("its columns have different lengths")
    if not len(shard_names) == len(shard_rows) == len(shard_sha256):
        raise ValueError("its shard table has columns of different lengths")
    return StoreIndex(
        format=kind,
        split=str(read_attribute(file, "split", "")),
        plan=str(read_attribute(file, "plan", "")),
        provenance=provenance,
        layout=GridLayout.from_provenance(provenance),
        image_id=image_id,
        file_name=file_name,
        valid=valid,
        invalid_reasons=dict(zip(read_column(file, "invalid_row", "i").tolist(), reasons, strict=True)),
        shard_names=shard_names,
        shard_rows=shard_rows,
        shard_sha256=shard_sha256,
    )


def _read_file_names(file: h5py.File, path: Path) -> Sequence[str]:
    column = get_dataset(file, "file_name")
    offset = column.id.get_offset()
    if column.chunks is not None or offset is None or column.dtype.kind != "S":  # rewritten by another program
        return read_texts(file, "file_name")
    return FileNames(path, offset, column.dtype.itemsize, len(column))
