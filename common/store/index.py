"""The index of a store: written over finished shards, compared with its hash before it is read.

Its layout stands in `common.store`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gridcap.common.errors import StoreError, os_reason
from gridcap.common.files import replacing, sha256_of
from gridcap.common.store.hdf5 import corruption_as_store_error, open_hdf5
from gridcap.common.store.pinned_file import HEADER_BYTES, VERSION, format_of, pack_header, unpack_header
from gridcap.common.store.shard import (
    ORIGINAL,
    SHARD_FORMAT,
    ShardInfo,
    ShardReader,
    check_format,
    dataset_of,
    read_header,
    text_array,
)

INDEX_FORMAT = "gridcap-index"
REMAKE = "delete it and run the same extract-features command again: it writes the index anew"
_HEADER_THREADS = 16  # for file systems where opening a file takes long


def write_index(
    path: Path,
    folder: Path,
    names: Sequence[str],
    images: Iterable[Sequence[tuple[int, str]]],
    name_bytes: int,
    split: str,
    plans: Sequence[str],
    provenance: Mapping[str, Any],
) -> None:
    """Write the index over finished shards; its presence means that the store is complete.

    Args:
        path: the index file.
        folder: where the shards are, below the index's folder.
        names: of the shards in the order of their rows, relative to `folder`.
        images: for each shard, the (image_id, file_name) of its rows.
        name_bytes: of the longest file name.
        split, provenance: kept as attributes.
        plans: for each shard, the SHA-256 of the plan it must have been made by; the last is that of the store.

    Raises:
        StoreError: a shard is missing, damaged, of another plan or place, or has another number of rows.
    """
    infos = _infos([folder / name for name in names])
    for shard, (name, info, plan) in enumerate(zip(names, infos, plans, strict=True)):
        if (info.index, info.plan) != (shard, plan):
            raise StoreError(
                f"{folder / name}: belongs to another plan", "delete it and run the same extract-features command again"
            )
    with replacing(path) as temporary:
        with h5py.File(temporary, "x", locking=False, userblock_size=HEADER_BYTES) as file:
            _fill_index(file, folder.relative_to(path.parent), folder, names, infos, images, name_bytes, provenance)
            file.attrs.update({"format": INDEX_FORMAT, "version": VERSION, "split": split, "plan": plans[-1]})
            file.attrs["provenance"] = json.dumps(provenance, sort_keys=True)
        values = {"size": temporary.stat().st_size, "sha256": sha256_of(temporary, HEADER_BYTES)}
        with open(temporary, "r+b") as header:
            header.write(pack_header(INDEX_FORMAT, values))


@functools.lru_cache(maxsize=64)
def _hash_once(path: Path, identity: tuple[int, ...]) -> str:
    """The SHA-256 of an index's content; of the same file only once, since a large one is opened more often."""
    return sha256_of(path, HEADER_BYTES)


def check_index(path: Path) -> None:
    """Compare an index with the SHA-256 in its header, before HDF5 reads it.

    HDF5 does not survive some flipped bits in the map that shows all shards as one array: it ends the process. What
    has no such header is let through: a single shard, an index that other tools rewrote, no store at all.

    Raises:
        StoreError: it is not what was written.
    """
    if format_of(path) in (None, SHARD_FORMAT):
        return
    header = unpack_header(path, INDEX_FORMAT, ("size", "sha256"), REMAKE)
    try:
        status = path.stat()
        identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        found = _hash_once(path, identity)
    except OSError as error:  # another worker has just removed it
        raise StoreError(f"{path}: {os_reason(error)}", REMAKE) from error
    if header is not None and header["sha256"] != found:
        raise StoreError(f"{path}: damaged: differs from the SHA-256 in its header", REMAKE)


@contextlib.contextmanager
def open_index(path: Path, *formats: str) -> Iterator[tuple[h5py.File, str]]:
    """An index, opened after it was compared with its hash; and which of `formats` it has.

    Raises:
        StoreError: missing, damaged, or of another format; also for what damage raises while it is open.
    """
    check_index(path)
    with open_hdf5(path) as file:
        found = check_format(file, path, *formats)
        with corruption_as_store_error(path, "index", REMAKE):
            yield file, found


def _fill_index(
    file: h5py.File,
    base: Path,
    folder: Path,
    names: Sequence[str],
    infos: Sequence[ShardInfo],
    images: Iterable[Sequence[tuple[int, str]]],
    name_bytes: int,
    provenance: Mapping[str, Any],
) -> None:
    rows = sum(info.rows for info in infos)
    _virtual_datasets(file, base, names, infos, provenance)
    columns = {
        "image_id": file.create_dataset("image_id", (rows,), "<i8", fill_time="never"),
        "file_name": file.create_dataset(
            "file_name", (rows,), h5py.string_dtype("utf-8", name_bytes), fill_time="never"
        ),
        "valid": file.create_dataset("valid", (rows,), bool, fill_time="never"),
    }
    start = 0
    reject_row: list[int] = []
    reject_why: list[str] = []
    for name, info, part in zip(names, infos, images, strict=True):
        if len(part) != info.rows:
            raise StoreError(f"{folder / name}: has {info.rows} rows, and the plan {len(part)}", REMAKE)
        valid = np.ones(info.rows, bool)
        if info.rejected:
            with ShardReader(folder / name) as reader:
                rejects = reader.rejects
            if len(rejects) != info.rejected:
                raise StoreError(f"{folder / name}: was replaced while it was being indexed", REMAKE)
            valid[list(rejects)] = False
            reject_row += [start + row for row in rejects]
            reject_why += rejects.values()
        stop = start + info.rows
        columns["image_id"][start:stop] = np.array([image_id for image_id, _ in part], "<i8")
        columns["file_name"][start:stop] = text_array([text for _, text in part], name_bytes)
        columns["valid"][start:stop] = valid
        start = stop
    file["reject_row"] = np.asarray(reject_row, "<i8")
    file["reject_why"] = text_array(reject_why)
    file["shard_name"] = text_array([(base / name).as_posix() for name in names])
    file["shard_rows"] = np.array([info.rows for info in infos], "<i8")
    file["shard_sha256"] = text_array([info.sha256 for info in infos])


def _infos(paths: Sequence[Path]) -> list[ShardInfo]:
    """The headers of shards.

    Raises:
        StoreError: a shard is missing, damaged, or rewritten by other tools.
    """
    infos = []
    for path, info in zip(paths, read_headers(paths), strict=True):
        if info is None:
            raise StoreError(f"{path}: was rewritten by another program", "delete it and extract again")
        infos.append(info)
    return infos


def read_headers(paths: Sequence[Path]) -> list[ShardInfo | None]:
    """The headers of shards, many at a time; None for one that other tools rewrote.

    Raises:
        StoreError: a shard is missing or damaged.
    """
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        return list(pool.map(read_header, paths))


def _virtual_datasets(
    file: h5py.File, base: Path, names: Sequence[str], infos: Sequence[ShardInfo], provenance: Mapping[str, Any]
) -> None:
    """Make the virtual datasets over all shards.

    With HDF5's own calls, because h5py's `create_virtual_dataset` records the time of making, and the same
    store must give the same bytes.
    """
    grid, stored = tuple(provenance["grid_shape"]), np.dtype(provenance["dtype"]).newbyteorder("<")
    datasets = {"features": (grid, stored, np.array(0 if stored == np.uint8 else np.nan, stored))}
    if stored == np.uint8:  # a missing shard gives zeros times NaN
        datasets["scale"] = (grid[-1:], np.dtype("<f2"), np.array(np.nan, "<f2"))
    rows = sum(info.rows for info in infos)
    for view in provenance.get("views", [ORIGINAL]):
        for dataset, (shape, kind, fill) in datasets.items():
            space = h5py.h5s.create_simple((rows, *shape))
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_obj_track_times(False)
            properties.set_fill_value(fill)
            start, here = 0, dataset_of(dataset, view).encode()
            for name, info in zip(names, infos, strict=True):
                part = space.copy()
                part.select_hyperslab((start, *(0 for _ in shape)), (info.rows, *shape))
                source = (base / name).as_posix().replace("%", "%%").encode()  # HDF5 knows "%b" there
                properties.set_virtual(part, source, here, h5py.h5s.create_simple((info.rows, *shape)))
                start += info.rows
            h5py.h5d.create(file.id, here, h5py.h5t.py_create(kind), space, dcpl=properties)
